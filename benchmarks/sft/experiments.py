"""The experiments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.grid.driver import Experiment
from benchmarks.grid.runs import Source
from benchmarks.grid.search import Method, only_named
from benchmarks.sft.combining import Combining
from benchmarks.sft.methods import FULL, child, chosen_by, chosen_from, lora, random, shira
from benchmarks.sft.sweep import Sweep, Task
from benchmarks.sft.timing import Timing


E2E = Task(
    "e2e",
    "E2E (restaurants described from their attributes)",
    ("tuetschek/e2e_nlg",),
    (("meaning", "text"), ("meaning_representation", "human_reference")),
)
GSM8K = Task(
    "gsm8k",
    "GSM8K (grade-school mathematics with worked answers)",
    ("openai/gsm8k", "main"),
    (("question", "answer"), ("question", "answer")),
)
TENTH = (1e-4, 3e-4, 1e-3)
HUNDREDTH = RANDOM_TENTH = (3e-4, 1e-3, 3e-3)
RANDOM_HUNDREDTH = (1e-3, 3e-3, 1e-2)
CORE = (lora(16), FULL, child(0.1, TENTH), random(0.1, RANDOM_TENTH))


class Settings(NamedTuple):
    """What all experiments are made with.

    Attributes:
        source: The model and the folder of the data.
        seeds: Of the runs, from 1 on.
        steps: Training steps.
        rows: In a training step.
        only: Names of methods to leave the others out, or none for all.
        more: Other options of every run.
    """

    source: Source
    seeds: int = 2
    steps: int = 100
    rows: int = 4
    only: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def sweep(self, name: str, title: str, text: str, task: Task, methods: tuple[Method, ...], **more: Any) -> Sweep:
        """Methods on a task, measured in the middle and at the end."""
        steps = (self.steps, self.rows, max(1, self.steps // 2))
        flags = ("--steps", "--batch-size", "--evaluate-every")
        options = [word for flag, value in zip(flags, steps, strict=True) for word in (flag, str(value))]
        seeds = tuple(range(1, self.seeds + 1))
        chosen = only_named(methods, self.only)
        return Sweep(name, title, text, self.source, task, chosen, (*options, *self.more), seeds, **more)

    @property
    def amount(self) -> str:
        """How much the runs train, in words."""
        return f"{self.steps} training steps of {self.rows} rows each."


def main_table(settings: Settings) -> Sweep:
    """All methods, with equal numbers of trained values."""
    methods = (
        *CORE,
        child(0.1, TENTH, channels=True),
        child(0.01, HUNDREDTH),
        child(0.01, HUNDREDTH, channels=True),
        random(0.1, RANDOM_TENTH, channels=True),
        lora(35),
        random(0.01, RANDOM_HUNDREDTH),
        random(0.01, RANDOM_HUNDREDTH, channels=True),
        lora(4),
        shira(0.1, RANDOM_TENTH),
    )
    text = (
        f"{settings.amount} A child network of density 0.1 has as many trained values as LoRA with r=35, one of "
        "density 0.01 as LoRA with r=4."
    )
    equal = (1.6, 1.5, 1.46, 1.44)
    return settings.sweep("sft", "A language model learns a task", text, E2E, methods, equal=equal)


def mathematics(settings: Settings) -> Sweep:
    """The same on a task with longer answers, with fewer methods."""
    methods = (*CORE, random(0.01, RANDOM_HUNDREDTH))
    return settings.sweep("gsm8k", "A language model learns mathematics", settings.amount, GSM8K, methods)


def density(settings: Settings) -> Sweep:
    """How large a child network should be."""
    kinds: tuple[tuple[Callable[..., Method], dict[float, tuple[float, ...]]], ...] = (
        (random, {0.001: (1e-2, 3e-2), 0.01: RANDOM_HUNDREDTH, 0.1: RANDOM_TENTH, 0.3: (3e-4, 1e-3)}),
        (child, {0.001: (1e-3, 3e-3), 0.01: HUNDREDTH, 0.1: TENTH, 0.3: (1e-4, 3e-4)}),
    )
    methods = tuple(
        kind(size, tried, channels=channels)
        for kind, rates in kinds
        for size, tried in rates.items()
        for channels in (False, True)
    )
    return settings.sweep("density", "How large a child network", settings.amount, E2E, methods)


def choice(settings: Settings) -> Sweep:
    """Which entries, and how many rows choose them."""
    fisher = child(0.1, TENTH)
    methods = (
        fisher,
        random(0.1, RANDOM_TENTH),
        chosen_by("magnitude", fisher),
        chosen_by("lowest", fisher._replace(rates=RANDOM_TENTH)),
        *(child(0.1, TENTH, examples=count)._replace(like=fisher) for count in (8, 256)),
        chosen_from(GSM8K, settings.source, fisher),
    )
    text = (
        f"{settings.amount} Child networks of 10 % of the entries: those with the largest Fisher information (of 32 "
        "rows, or at the same learning rate of other numbers of rows, or of rows of another task), random ones, those "
        "with the largest weights, and those with the smallest Fisher information."
    )
    return settings.sweep("choice", "Which entries", text, E2E, methods)


def combining(settings: Settings) -> Combining:
    """Two tasks in one model."""
    methods = (lora(16), child(0.1, TENTH), random(0.1, RANDOM_TENTH))
    return Combining(main_table(settings), mathematics(settings), methods)


def timing(settings: Settings) -> Timing:
    """What a training step costs; for child networks that does not depend on how they were chosen."""
    sizes = ((0.1, RANDOM_TENTH), (0.01, RANDOM_HUNDREDTH))
    children = (random(*size, channels=channels) for size in sizes for channels in (False, True))
    methods = (FULL, *children, shira(0.1, RANDOM_TENTH), lora(4), lora(35))
    return Timing(main_table(settings), only_named(methods, settings.only))


EXPERIMENTS: dict[str, Callable[[Settings], Experiment]] = {
    "sft": main_table,
    "gsm8k": mathematics,
    "density": density,
    "choice": choice,
    "combined": combining,
    "steps": timing,
}
