"""What PEFT's conversion to LoRA loses of a child network, by rank: the error of the change, the score, and the file.

    python -m benchmarks.conversion --model folder --data folder --task stsb --bf16 --output docs

Trains child networks with examples/glue.py, converts each, and writes `conversion.md`. All flags but those below are
those of the example; the kind of child network and its learning rate are set here.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from peft import PeftModel, save_as_lora
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

from benchmarks.glue.script import glue
from benchmarks.measure import say
from benchmarks.tables import table
from peft_child.layers.layer import child_tuning_layers


RANKS = (4, 8, 16, 32, 64, 128)
BASE, HEAD, CHILD = "base model, new head", "base model, trained head", "**child network**"
ABOUT = """# What conversion to LoRA loses

PEFT's `save_as_lora(folder, model, rank=...)` writes the LoRA adapter of a rank that is nearest to a child network:
each changed weight gets the first singular vectors of its change. Convert for programs that load LoRA adapters alone.
Everywhere else load the adapter itself or merge it, which loses nothing.

A few singular vectors hold much of a change, but the change of single entries has a high rank, so the rest comes
slowly, and the file is soon larger than the adapter's. The change of `k` input channels of a weight has at most rank
`k`, so LoRA of this rank has all of it. `rank` can also be a share, such as `rank=0.9`: then each weight gets the rank
that keeps this share of the squared norm, an error of at most 0.32.

In the runs below the score suffers far less than the weights. From rank 8 on, most of what it loses is due to the
biases: a LoRA of full rank, in the last rows, lacks nothing else. This is one small encoder on one task, so measure
the converted adapter on your own.

What no rank keeps:

- Changes of biases are left out, with a warning.
- A child network in anything but linear layers (embeddings, convolutions, normalisations) is refused as a whole.
- The trained head is copied if it is a single layer. Of a head of several layers, such as RoBERTa's, PEFT 0.21.2 mixes
  up the names, and the file does not load."""
Rows = dict[str, dict[str, float]]  # what was measured, by name of the row and of the column


class Network(NamedTuple):
    """A kind of child network, and the peak of its learning rate."""

    title: str
    granularity: str
    density: float
    learning_rate: float


NETWORKS = (
    Network("Single entries, density 0.1", "entry", 0.1, 3e-4),
    Network("Input channels, density 0.1", "input_channel", 0.1, 3e-4),
)


def measure(settings: argparse.Namespace, seed: int, ranks: Sequence[int]) -> Rows:
    """Train a child network, and measure it and what it is converted to."""
    trainer = glue.train(settings, seed)
    model = trainer.model
    # In order of length, for less padding.
    lengths = [len(tokens) for tokens in trainer.eval_dataset["input_ids"]]
    trainer.eval_dataset = trainer.eval_dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    with model.disable_adapter():
        rows = {BASE: {"score": score(trainer, settings)}}
    enable(model, False)
    rows[HEAD] = {"score": score(trainer, settings)}
    enable(model, True)
    rows[CHILD] = {"score": score(trainer, settings), "bytes": saved(model, settings.output)}
    for rank in ranks:
        say(f"rank {rank}")
        with tempfile.TemporaryDirectory() as folder:
            save_as_lora(folder, model, rank=rank)
            lora = PeftModel.from_pretrained(fresh(settings, model), folder)
            converted = Trainer(lora, trainer.args, trainer.data_collator, eval_dataset=trainer.eval_dataset)
            file = Path(folder, "adapter_model.safetensors")
            found = {"error": error(model, lora), "score": score(converted, settings), "bytes": file.stat().st_size}
            rows[f"LoRA, rank {rank}"] = found
    return rows


def enable(model: nn.Module, enabled: bool) -> None:
    """Whether the child network counts; the trained head always does."""
    for layer in child_tuning_layers(model).values():
        layer.enable_adapters(enabled)


def fresh(settings: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The base model again, as `glue.train` loads it."""
    labels = model.config.num_labels
    return AutoModelForSequenceClassification.from_pretrained(settings.model, num_labels=labels, dtype=torch.float32)


def score(trainer: Trainer, settings: argparse.Namespace) -> float:
    """The last metric of the task: Spearman correlation for STS-B."""
    return list(glue.evaluate(trainer, trainer.eval_dataset, settings.task).values())[-1]


def saved(model: nn.Module, folder: str) -> int:
    """Save an adapter; returns the bytes of its file."""
    model.save_pretrained(folder)
    return Path(folder, "adapter_model.safetensors").stat().st_size


@torch.no_grad()
def error(model: nn.Module, lora: nn.Module) -> float:
    """Norm of what is lost of the change of all targeted weights together, to the norm of the change."""
    lost = total = 0.0
    for name, layer in child_tuning_layers(model).items():
        change = layer.get_delta_weight("default")
        found = lora.get_submodule(name).get_delta_weight("default").to(change.device)
        lost += float((change - found).square().sum())
        total += float(change.square().sum())
    return (lost / total) ** 0.5


def page(measured: Mapping[Network, Sequence[Rows]], settings: argparse.Namespace, command: str) -> str:
    """The results as Markdown."""
    seeds, rows = settings.seeds, settings.max_train_examples or "all"
    numbers = f"{len(seeds)} seeds; the figures are means" if len(seeds) > 1 else "one run of each kind, with one seed"
    versions = ", ".join(f"{name} {number}" for name, number in glue.VERSIONS.items())
    protocol = (
        f"Model `{Path(settings.model).name}`, task `{settings.task}`, {rows} training rows, {settings.epochs:g} "
        f"epochs, {numbers}. All linear layers but the head are targeted. *Error* is the Frobenius norm of what is "
        "lost of the change, over all targeted weights, to the norm of the change. *Score* is the task's last metric "
        "(for STS-B Spearman correlation), times 100, on the validation split. Files include the head."
    )
    tables = [f"## {network.title}\n\n{of_network(seeds)}" for network, seeds in measured.items()]
    return "\n\n".join([ABOUT, protocol, *tables, f"Made with `{command}`; {versions}."]) + "\n"


def of_network(seeds: Sequence[Rows]) -> str:
    """The table of one kind of child network."""
    cells = {"error": "{:.3f}", "score": "{:.1f}", "bytes": "{:.2f}"}
    scale = {"error": 1, "score": 100, "bytes": 1e-6}
    lines = []
    for name, first in seeds[0].items():
        means = {column: scale[column] * fmean(rows[name][column] for rows in seeds) for column in first}
        lines.append(
            [name, *(cell.format(means[column]) if column in means else "" for column, cell in cells.items())]
        )
    return table(["", "error", "score", "file, MB"], lines)


def main(argv: list[str] | None = None) -> dict[Network, list[Rows]]:
    """Measure all, print the page, and write it if asked to."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of the LoRA matrices (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for conversion.md")
    args, rest = parser.parse_known_args(argv)
    measured: dict[Network, list[Rows]] = {}
    for network in NETWORKS:
        own = ["--method", "child", "--granularity", network.granularity, "--density", str(network.density)]
        settings = glue.parse_arguments().parse_args([*rest, *own, "--learning-rate", str(network.learning_rate)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LoRA cannot express the change of")  # of biases, as the page says
            measured[network] = [measure(settings, seed, args.ranks) for seed in settings.seeds]
    words = [Path(word).name if Path(word).is_dir() else word for word in argv]  # the rest belongs to this machine
    text = page(measured, settings, " ".join(["python -m benchmarks.conversion", *words]))
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "conversion.md").write_text(text, encoding="utf-8")
    return measured


if __name__ == "__main__":
    main()
