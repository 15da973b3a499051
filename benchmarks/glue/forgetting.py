"""What adapting to a new domain costs on the old one, for the small language model of `examples/quickstart.py`.

python -m benchmarks.glue.forgetting --method child --density 0.1 --learning-rate 0.01
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.glue.script import glue, quickstart
from benchmarks.grid.runs import locked
from peft_child import ChildTuningConfig, select_child_network


METHODS = ("base", "full", "child", "task_free", "random", "lora")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Adapt with each seed; returns perplexities on held-out text of both domains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", choices=METHODS, default="child", help="how to adapt, or what there is before")
    add("--density", type=float, default=0.1, help="share of the child network, or of gradients")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--learning-rate", type=float, default=1e-2, help="peak of the schedule")
    add("--steps", type=int, default=150, help="training steps")
    add("--pretrain-steps", type=int, default=600, help="training steps of the base model")
    add("--hidden-size", type=int, default=128, help="width of the base model")
    add("--documents", type=int, help="use so many texts of each domain; all if not given")
    add("--seeds", type=int, nargs="+", default=[1], help="of the order, the masks and LoRA; a run for each")
    add("--bases", type=Path, default=Path("runs/forgetting"), help="folder for base models, which are trained once")
    add("--output", type=Path, default=Path("runs/forgetting/adapted"), help="folder for what was trained last")
    args = parser.parse_args(argv)
    vars(args).update(batch_size=8, held_out_examples=128, fisher_examples=256)
    return [run(args, seed) for seed in args.seeds]


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Adapt with one seed, measure and save."""
    start = time.perf_counter()
    base, train, new, old = prepare(args)
    settings = argparse.Namespace(**{**vars(args), "seed": seed})
    torch.manual_seed(seed)
    model = adapter(quickstart.load_base(base), train, settings)
    if args.method != "base":
        quickstart.train(model, train, args.steps, args.learning_rate, settings, args.method)
    model.save_pretrained(args.output)
    result = {
        "method": args.method,
        "seed": seed,
        "metrics": {
            "new": quickstart.perplexity(model, new[: args.held_out_examples], settings),
            "old": quickstart.perplexity(model, old[: args.held_out_examples], settings),
        },
        "entries": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "bytes": sum(file.stat().st_size for file in args.output.glob("*.safetensors")),
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {name: value for name, value in vars(args).items() if name not in ("seeds", "bases", "output")},
        "versions": glue.VERSIONS,
    }
    print(json.dumps(result))
    return result


def prepare(args: argparse.Namespace) -> tuple[str, Any, Any, Any]:
    """The base model, trained if that has not been done yet, new examples to train on, and held-out ones of both."""
    old_text, new_text = (text[: args.documents] for text in (quickstart.source_code(), quickstart.reference_prose()))
    tokenizer = quickstart.GPT2Tokenizer().train_new_from_iterator(
        old_text, quickstart.VOCABULARY, show_progress=False
    )
    old_train, old = quickstart.encode(tokenizer, old_text)
    train, new = quickstart.encode(tokenizer, new_text)
    folder = args.bases / f"width_{args.hidden_size}_steps_{args.pretrain_steps}_texts_{args.documents or 'all'}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with locked(folder / "lock"):
        if not done.exists():
            torch.manual_seed(0)
            quickstart.pretrain(
                tokenizer, old_train, argparse.Namespace(**{**vars(args), "seed": 0, "output": folder})
            )
            done.touch()
    return str(folder / "base"), train, new, old


def adapter(model: Any, train: Any, args: argparse.Namespace) -> Any:
    """The model as it is trained."""
    if args.method in ("base", "full"):
        return model.requires_grad_(args.method == "full")
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if args.method == "lora":
        return get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common))
    variant = glue.VARIANTS[args.method]
    adapted = get_peft_model(model, ChildTuningConfig(variant=variant, density=args.density, seed=args.seed, **common))
    if args.method == "child":
        examples = quickstart.batches(train, args)
        print(select_child_network(adapted, examples, num_examples=args.fisher_examples, progress_bar=False))
    return adapted


if __name__ == "__main__":
    main()
