"""The experiments by name: after the tables, figures and ablations of Xu et al. (2021), and what users ask first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.glue.comparison import Column, Comparison
from benchmarks.glue.grid import Grid
from benchmarks.glue.methods import (
    FISHER_EXAMPLES,
    FULL,
    LORA,
    SHIRA,
    SPARSE_RATES,
    UNTRAINED,
    by_channels,
    chosen_by,
    control,
    elsewhere,
    random,
    task_driven,
    task_free,
)
from benchmarks.glue.overlaps import Overlaps
from benchmarks.glue.rates import Rates
from benchmarks.glue.tasks import title
from benchmarks.glue.trade_off import Forgetting
from benchmarks.grid.driver import Experiment
from benchmarks.grid.runs import Source
from benchmarks.grid.search import Method, only_named


TRANSFER = ("mnli", "snli", "sick")
FISHER_EXAMPLES_TRIED = (32, 64, 128, 512, 1000)


class Settings(NamedTuple):
    """What all experiments are made with.

    Attributes:
        source: The model and the data.
        tasks: Of the main table; the others use as many of them as they need.
        seeds: Of the reported runs, from 1 on.
        rows: Training rows of each run, or None for all.
        epochs: Passes over them.
        full: The larger grid, for a GPU.
        only: Names of methods to leave the others out, or none for all.
    """

    source: Source
    tasks: tuple[str, ...] = ("cola", "mrpc", "stsb")
    seeds: int = 5
    rows: int | None = 1000
    epochs: float = 3
    full: bool = False
    only: tuple[str, ...] = ()

    def grid(
        self, tasks: tuple[str, ...], methods: tuple[Method, ...], rows: int | None = None, *reported: str
    ) -> Grid:
        """A grid of these settings; `rows` and `reported` are settings of the reported runs."""
        chosen = only_named(methods, self.only)
        common = ("--epochs", f"{self.epochs:g}", "--batch-size", "16", "--bf16")
        searched, final = (
            ("--max-train-examples", str(count)) if count else () for count in (self.rows or rows, rows or self.rows)
        )
        seeds = tuple(range(1, self.seeds + 1))
        return Grid(self.source, tasks, chosen, common, searched, (*final, *reported), seeds)


def main_table(settings: Settings) -> Comparison:
    """Child-Tuning against full fine-tuning and other ways to train few entries."""
    methods = (FULL, task_driven(0.1), task_driven(0.3), task_free(0.3), random(0.3), LORA)
    more = (task_driven(0.2), task_free(0.2), SHIRA) if settings.full else ()
    return Comparison(
        "main",
        "Child-Tuning on GLUE tasks",
        _amount(settings),
        settings.grid(settings.tasks, (*methods, *more)),
        _columns(settings.tasks),
    )


def ablations(settings: Settings) -> Comparison:
    """Which entries are chosen, and what the others are for."""
    methods = (task_driven(0.3), random(0.3), *(control(child, 0.3) for child in ("lowest", "authors", "pruned")))
    text = (
        "CT_D at density 0.3 against other choices of as many entries, and with all others set to zero before "
        "training."
    )
    return _on_tasks(settings, "ablations", "Which child network", text, methods)


def granularity(settings: Settings) -> Comparison:
    """Single entries against whole input channels, chosen and random."""
    entries = [make(density) for density in (0.1, 0.01) for make in (task_driven, random)]
    methods = (*entries, *map(by_channels, entries), LORA)
    text = "Child networks of single entries and of whole input channels, chosen by Fisher information and at random."
    return _on_tasks(settings, "granularity", "Entries or input channels", text, methods)


def few_examples(settings: Settings) -> Comparison:
    """How many examples the choice needs to train as well."""
    methods = (task_driven(0.3), *(chosen_by(count, 0.3) for count in FISHER_EXAMPLES_TRIED))
    text = (
        f"CT_D at density 0.3, chosen by {FISHER_EXAMPLES} examples and by fewer and more, at the same learning rate."
    )
    return _on_tasks(settings, "examples", "How many examples choose the child network", text, methods)


def _on_tasks(settings: Settings, name: str, title: str, text: str, methods: tuple[Method, ...]) -> Comparison:
    """A comparison of methods on the tasks of the settings."""
    grid = settings.grid(settings.tasks, methods)
    return Comparison(name, title, f"{text} {_amount(settings)}", grid, _columns(settings.tasks))


def transfer(settings: Settings) -> Comparison:
    """Trained on one inference data set, evaluated on others without training."""
    methods = tuple(map(elsewhere, (FULL, task_driven(0.3), task_free(0.3), LORA)))
    sources = ("mnli", "snli")
    columns = [
        Column(f"{title(source)} to {title(target)}", source, ("transfer", target))
        for source in sources
        for target in TRANSFER
        if target != source
    ]
    return Comparison(
        "transfer",
        "Domain transfer",
        "Trained on 5,000 examples of MNLI or SNLI and evaluated on the others, and on SICK, as they are.",
        settings.grid(sources, methods, 5000, "--evaluate-on", *TRANSFER),
        tuple(columns),
    )


def probes(settings: Settings) -> Comparison:
    """Linear classifiers for other tasks on a model that was trained for MRPC, after Figure 2 of the paper."""
    methods = (*map(elsewhere, (FULL, task_driven(0.1), task_driven(0.3), task_free(0.3))), UNTRAINED)
    tasks = tuple(task for task in settings.tasks if task != "mrpc")
    if not tasks:
        raise ValueError("--tasks must name a task other than mrpc, to probe for; got mrpc alone.")
    columns = tuple(Column(f"MRPC to {title(task)}", "mrpc", ("probes", task)) for task in tasks)
    return Comparison(
        "probes",
        "Generalisation to other tasks",
        "Trained on MRPC and frozen; then a linear classifier is trained for each other task on 1,000 of its "
        f"examples. {_amount(settings)}",
        settings.grid(("mrpc",), methods, None, "--probe", *tasks),
        columns,
    )


def rates(settings: Settings) -> Rates:
    """Which density and which learning rate to begin with."""
    grid = settings.grid(settings.tasks, (task_driven(0.1), task_driven(0.3)))
    return Rates(grid, SPARSE_RATES, _amount(settings))


def overlaps(settings: Settings) -> Overlaps:
    """The child networks of the tasks, and of few examples."""
    return Overlaps(settings.source, settings.tasks, tuple(range(1, settings.seeds + 1)))


def forgetting(settings: Settings) -> Forgetting:
    """Two domains and one small language model."""
    return Forgetting(settings.source, tuple(range(1, settings.seeds + 1)))


EXPERIMENTS: dict[str, Callable[[Settings], Experiment]] = {
    "main": main_table,
    "ablations": ablations,
    "examples": few_examples,
    "granularity": granularity,
    "rates": rates,
    "transfer": transfer,
    "probes": probes,
    "overlap": overlaps,
    "forgetting": forgetting,
}


def _columns(tasks: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(Column(title(task), task) for task in tasks)


def _amount(settings: Settings) -> str:
    rows = f"{settings.rows:,} training examples" if settings.rows else "All training examples"
    return f"{rows}, {settings.epochs:g} epochs."
