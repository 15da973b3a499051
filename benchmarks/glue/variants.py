"""What `examples/glue.py` does, with more ways to choose and to judge: the controls of the paper, and other tasks.

python -m benchmarks.glue.variants --task mrpc --method child --child lowest
python -m benchmarks.glue.variants --task mnli --data data --evaluate-on snli sick
python -m benchmarks.glue.variants --task mrpc --probe cola stsb
"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.glue.script import glue
from benchmarks.grid.scores import turned_round
from peft_child import estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers


DATASETS = {"snli": ["stanfordnlp/snli"]}  # on the Hub, for tasks that are not in GLUE; others need --data
PROBE_ROWS = 1000


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train with each seed; returns the results."""
    parser = glue.parse_arguments()
    parser.add_argument("--child", choices=CHOICES, default="highest", help="how the child network is chosen")
    parser.add_argument("--evaluate-on", nargs="*", default=[], help="tasks with the same labels, without training")
    parser.add_argument("--probe", nargs="*", default=[], help="tasks to train a linear classifier for, on the rest")
    parser.add_argument("--untrained", action="store_true", help="judge the model as it is")
    args = parser.parse_args(argv)
    args.epochs = 0 if args.untrained else args.epochs
    args.learning_rate = args.learning_rate or glue.LEARNING_RATES[args.method]
    if not args.data and not args.dataset:
        args.dataset = DATASETS.get(args.task)
    return [run(args, seed) for seed in args.seeds]


def run(args: Namespace, seed: int) -> dict[str, Any]:
    """Train with one seed, evaluate everywhere and save."""
    start = time.perf_counter()
    trainer = glue.train(args, seed, CHOICES[args.child])
    if args.untrained:
        trainer.model.requires_grad_(False)  # nothing has been
    measured = {
        "metrics": glue.evaluate(trainer, trainer.eval_dataset, args.task),
        "transfer": {task: transfer(trainer, for_task(args, task)) for task in args.evaluate_on},
        "probes": {task: probe(trainer, for_task(args, task), seed) for task in args.probe},
    }
    return dict(glue.record(args, seed, trainer, start, measured))


def for_task(args: Namespace, task: str) -> Namespace:
    """The settings for the data of another task."""
    return Namespace(**{**vars(args), "task": task, "dataset": DATASETS.get(task), "hold_out": None})


# Ways to choose


def lowest(model: Any, examples: Any, args: Namespace) -> None:
    """The entries with the smallest Fisher information, to see whether it matters which ones are chosen."""
    scores = estimate_fisher(model, examples, num_examples=args.num_fisher_examples, progress_bar=False)
    print(select_child_network(model, scores=turned_round(scores)))


def authors(model: Any, examples: Any, args: Namespace) -> None:
    """The choice of the code released with the paper: squared gradients of batches."""
    model.peft_config["default"] = replace(model.peft_config["default"], fisher="authors")
    batches = torch.utils.data.DataLoader(
        examples.dataset, args.batch_size, shuffle=True, collate_fn=examples.collate_fn
    )
    glue.choose(model, batches, args)


@torch.no_grad()
def pruned(model: Any, examples: Any, args: Namespace) -> None:
    """The usual child network in a base without the rest: everything else that is targeted becomes zero."""
    glue.choose(model, examples, args)
    for layer in child_tuning_layers(model).values():
        for parameter, tensor in layer.base_layer.named_parameters():
            mask = torch.zeros(tensor.numel(), dtype=torch.bool)
            if layer.targets_of("default").get(parameter) in layer.named_deltas("default"):
                mask[layer.indices("default", parameter).cpu()] = True
            tensor.mul_(mask.view(tensor.shape).to(tensor.device))


CHOICES = {"highest": glue.choose, "lowest": lowest, "authors": authors, "pruned": pruned}


# Ways to judge


def transfer(trainer: Any, args: Namespace) -> dict[str, float]:
    """Metrics on the validation split of another task with the same labels."""
    rows = glue.encode(glue.read_split(args, "validation"), trainer.processing_class, args.max_length)
    return dict(glue.evaluate(trainer, rows, args.task))


def probe(trainer: Any, args: Namespace, seed: int) -> dict[str, float]:
    """Metrics of a linear classifier, trained for another task on the frozen features of the trained model."""
    rows, validation, num_labels = glue.load_data(Namespace(**{**vars(args), "max_train_examples": PROBE_ROWS}), seed)
    encoded = [glue.encode(part, trainer.processing_class, args.max_length) for part in (rows, validation)]
    (inputs, labels), (others, expected) = (features(trainer, part) for part in encoded)
    linear = Ridge(alpha=1.0) if num_labels == 1 else LogisticRegression(max_iter=5000)
    fitted = make_pipeline(StandardScaler(), linear).fit(inputs, labels)
    outputs = fitted.predict(others)[:, None] if num_labels == 1 else fitted.predict_proba(others)
    return dict(glue.glue_metrics(args.task, outputs, expected))


@torch.no_grad()
def features(trainer: Any, rows: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What the last linear layer, the head, gets to see of every row, of shape (rows, width), and the labels."""
    seen: list[torch.Tensor] = []
    *_, head = (module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear))
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    device = trainer.args.device
    model = trainer.model.eval()
    inputs = rows.remove_columns("labels")  # the model could not compute a loss for another task's
    for batch in torch.utils.data.DataLoader(inputs, 64, collate_fn=trainer.data_collator):
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.args.bf16):
            model(**batch.to(device))
    handle.remove()
    return torch.cat(seen).numpy(), np.array(rows["labels"])


if __name__ == "__main__":
    main()
