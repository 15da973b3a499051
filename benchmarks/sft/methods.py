"""The methods that are compared, with the learning rates to begin the search with."""

from __future__ import annotations

from benchmarks.grid.runs import Source
from benchmarks.grid.search import Method
from benchmarks.sft.sweep import Task


FISHER_EXAMPLES = 32
OTHER_CHOICES = {"magnitude": "largest", "lowest": "lowest Fisher"}
LORA_RATES = (3e-4, 1e-3, 3e-3)


def child(density: float, rates: tuple[float, ...], *, channels: bool = False, examples: int | None = None) -> Method:
    """Child-Tuning_D, by entries or by input channels, chosen with `FISHER_EXAMPLES` or as many as are given."""
    name = f"Fisher {'channels' if channels else 'entries'} {density:g}"
    options = ("--density", f"{density:g}", "--num-fisher-examples", str(examples or FISHER_EXAMPLES))
    return Method(
        f"{name}, {examples} examples" if examples else name,
        ("--method", "child", "--variant", "task_driven", *options, *_granularity(channels)),
        rates,
        "sft",
    )


def random(density: float, rates: tuple[float, ...], *, channels: bool = False) -> Method:
    """A random child network."""
    name = f"random {'channels' if channels else 'entries'} {density:g}"
    options = ("--method", "child", "--variant", "random", "--density", f"{density:g}", *_granularity(channels))
    return Method(name, options, rates, "sft")


def lora(rank: int) -> Method:
    """LoRA in all linear layers."""
    return Method(f"LoRA r={rank}", ("--method", "lora", "--rank", str(rank)), LORA_RATES, "sft")


def shira(density: float, rates: tuple[float, ...]) -> Method:
    """PEFT's SHiRA: random entries, as many in each matrix as LoRA would have."""
    return Method(f"SHiRA {density:g}", ("--method", "shira", "--density", f"{density:g}"), rates, "sft")


def chosen_by(choice: str, like: Method) -> Method:
    """The same as one that is chosen by Fisher information, with another choice of its child network."""
    return Method(
        like.name.replace("Fisher", OTHER_CHOICES[choice]),
        (*like.options, "--choose", choice),
        like.rates,
        "sft_variants",
    )


def chosen_from(task: Task, source: Source, like: Method) -> Method:
    """The same as a method at its learning rate, with the child network of another task."""
    options = (*like.options, "--choose-from", *task.words(source))
    return Method(f"{like.name}, of {task.name}", options, like.rates, "sft_variants", like)


def _granularity(channels: bool) -> tuple[str, ...]:
    return ("--granularity", "input_channel") if channels else ()


FULL = Method("full fine-tuning", ("--method", "full"), (3e-5, 1e-4, 3e-4), "sft")
