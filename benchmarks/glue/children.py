"""Child networks compared without training: those of different tasks, and those that few examples choose.

python -m benchmarks.glue.children --task mrpc --others cola stsb
python -m benchmarks.glue.children --task mrpc --few 32 64 128 --max-train-examples 1000
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.glue.script import glue
from benchmarks.glue.variants import for_task
from peft_child import estimate_fisher
from peft_child.tensors.topk import select_largest


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare with each seed; returns the overlaps: the share of one child network that is in the other."""
    parser = glue.parse_arguments()
    parser.add_argument("--others", nargs="*", default=[], help="tasks whose child networks to compare with")
    parser.add_argument("--few", type=int, nargs="*", default=[], help="numbers of examples to compare with all rows")
    args = parser.parse_args(argv)
    results = []
    for seed in args.seeds:
        start = time.perf_counter()
        overlaps = between_tasks(args, seed) if args.others else {}
        if args.few:
            overlaps["examples"] = with_few_examples(args, seed)
        settings = {name: getattr(args, name) for name in ("density", "num_fisher_examples", "max_train_examples")}
        seconds = round(time.perf_counter() - start, 1)
        common = {"task": args.task, "seed": seed, "seconds": seconds, "settings": settings, "versions": glue.VERSIONS}
        results.append({"overlaps": overlaps, **common})
        print(json.dumps(results[-1]))
    return results


def between_tasks(args: Namespace, seed: int) -> dict[str, dict[str, float]]:
    """The child networks of every two tasks; and of every task with itself, from other rows, another head or both."""
    another = seed + 1000
    changes = {"rows": (another, seed), "head": (seed, another), "both": (another, another)}
    settings = {task: for_task(args, task) for task in (args.task, *args.others)}
    children = {task: child_of(own, seed, args.num_fisher_examples) for task, own in settings.items()}
    pairs = {f"{one} {other}": shared(children[one], children[other]) for one, other in combinations(children, 2)}
    again = {
        name: {
            task: shared(children[task], child_of(own, rows, args.num_fisher_examples, head_seed=head))
            for task, own in settings.items()
        }
        for name, (rows, head) in changes.items()
    }
    return {"tasks": pairs, **again}


def with_few_examples(args: Namespace, seed: int) -> dict[str, float]:
    """The child network that all rows choose with those that the first few choose, and with the authors' choice."""
    everything = child_of(args, seed, None)
    few = {str(count): shared(everything, child_of(args, seed, count)) for count in args.few}
    return {**few, "authors": shared(everything, child_of(args, seed, None, fisher="authors"))}


def child_of(
    args: Namespace, seed: int, num_examples: int | None, fisher: str = "per_example", head_seed: int | None = None
) -> dict[str, Tensor]:
    """The positions that examples of a task choose, by parameter, in the model that training would start from.

    Args:
        args: The settings.
        seed: Of the rows, and of the head if it has none of its own.
        num_examples: How many of the rows choose, or None for all.
        fisher: As in ChildTuningConfig.
        head_seed: Of the new head.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows, _, num_labels = glue.load_data(args, seed)
    transformers.set_seed(seed if head_seed is None else head_seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=num_labels, dtype=torch.float32
    )
    config = replace(glue.adapter_config(model, args, seed), fisher=fisher)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    size = args.batch_size if fisher == "authors" else 1
    examples = DataLoader(glue.encode(rows, tokenizer, args.max_length), size, collate_fn=collator)
    scores = estimate_fisher(get_peft_model(model, config), examples, num_examples=num_examples, progress_bar=False)
    return select_largest(scores, config.child_size(sum(score.numel() for score in scores.values())))


def shared(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The share of the first child network that is in the second, of as many entries."""
    both = sum(int(torch.isin(first[name], second[name], assume_unique=True).sum()) for name in first)
    return both / sum(map(len, first.values()))


if __name__ == "__main__":
    main()
