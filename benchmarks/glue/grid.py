"""Grids of runs: tasks, methods and seeds, with a learning rate chosen for each method on each task.

The rate is chosen on a tenth of the training split that the runs of the search do not train on; the validation split
is not even read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

from benchmarks.glue.tasks import TRAINING_ROWS
from benchmarks.grid.runs import Known, Run, Source, succeeded
from benchmarks.grid.search import Method, rates_to_try, searched


HOLD_OUT = ("--hold-out", "0.1")
SEARCH_SEEDS = (101,)  # others than those that are reported

Score = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Grid:
    """Every method on every task with every seed.

    Attributes:
        source: The model and the data.
        tasks: Names of tasks.
        methods: What is compared.
        options: Settings that all runs have in common.
        search_options: Settings of the search alone.
        reported_options: Settings of the reported runs alone.
        seeds: Of the runs that are reported.
    """

    source: Source
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    options: tuple[str, ...]
    search_options: tuple[str, ...]
    reported_options: tuple[str, ...]
    seeds: tuple[int, ...]

    def runs(self, known: Known) -> Iterator[Run]:
        """The runs that can be planned with what is known, those of the search first."""
        pairs = [(task, method) for task in self.tasks for method in self.methods]
        for task, method in pairs:
            for rate in self.rates(task, method, known):
                yield from self.search(task, method, rate)
        for task, method in pairs:
            rate = self.chosen_rate(task, method, known)
            if rate is not None:
                yield from self.reported(task, method, rate)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs there will be if no search goes on; where no rate is chosen yet, with any."""
        for task in self.tasks:
            for method in self.methods:
                rates = self.rates(task, method, known)
                for rate in rates:
                    yield from self.search(task, method, rate)
                yield from self.reported(task, method, self.chosen_rate(task, method, known) or rates[0])

    def search(self, task: str, method: Method, rate: float) -> list[Run]:
        """The runs that try a rate; they see training rows only."""
        more = (*self.search_options, *HOLD_OUT)
        return [self._run(task, searched(method), rate, seed, more) for seed in SEARCH_SEEDS]

    def reported(self, task: str, method: Method, rate: float) -> list[Run]:
        """The runs of one cell of the table."""
        return [self._run(task, method, rate, seed, self.reported_options) for seed in self.seeds]

    def rates(self, task: str, method: Method, known: Known) -> list[float]:
        """The rates to try, as far as can be said now."""
        return rates_to_try(method, partial(self._best, task, method, known=known))

    def chosen_rate(self, task: str, method: Method, known: Known) -> float | None:
        """The best of the rates tried, or None as long as some are to be tried or if all have failed."""
        return self._best(task, method, self.rates(task, method, known), known)

    def scores(self, task: str, method: Method, known: Known, score: Score | None = None) -> dict[int, float]:
        """Scores of the reported runs that have succeeded, by seed; by default the score of the task."""
        results = self.results(task, method, known)
        return {seed: (score or task_score)(result) for seed, result in results.items()}

    def results(self, task: str, method: Method, known: Known) -> dict[int, Mapping[str, Any]]:
        """The reported runs that have succeeded, by seed."""
        rate = self.chosen_rate(task, method, known)
        runs = [] if rate is None else self.reported(task, method, rate)
        return {result["seed"]: result for result in succeeded(runs, self.source, known)}

    def search_score(self, task: str, method: Method, rate: float, known: Known) -> float | None:
        """Mean score of a rate on held-out training rows; -inf after a failure, None if runs are missing."""
        results = [known.get(run.command(self.source)) for run in self.search(task, method, rate)]
        if None in results:
            return None
        return fmean(-math.inf if "error" in result else task_score(result) for result in results if result)

    def _best(self, task: str, method: Method, rates: Sequence[float], known: Known) -> float | None:
        scores = {rate: self.search_score(task, method, rate, known) for rate in rates}
        done = {rate: score for rate, score in scores.items() if score is not None}
        if len(done) < len(rates) or max(done.values()) == -math.inf:
            return None
        return max(
            done, key=lambda rate: (done[rate], rate)
        )  # of equals the largest: small rates may not learn at all

    def _run(self, task: str, method: Method, rate: float, seed: int, more: tuple[str, ...]) -> Run:
        where = ("--task", task, *method.options, *self.options)
        return Run(method.script, (*where, "--learning-rate", f"{rate:g}", "--seeds", str(seed), *more))


def task_score(result: Mapping[str, Any]) -> float:
    """The mean of the metrics of a task, in percent, as GLUE averages them."""
    return 100 * fmean(result["metrics"].values())


def steps(run: Run) -> int:
    """Optimizer steps of a run, about."""
    if run.script == "forgetting":
        return int(run.option("--steps") or 150)
    rows = TRAINING_ROWS.get(run.option("--task") or "", 10_000)
    rows = min(rows, int(run.option("--max-train-examples") or rows))
    return math.ceil(rows * float(run.option("--epochs") or 3) / int(run.option("--batch-size") or 16))


def estimated_seconds(source: Source, seconds_per_step: float, run: Run, known: Known) -> float:
    """How long a run takes: the median of the same script's on the same task, or so many seconds for each step."""
    start = " ".join(run.command(source).split()[:3])
    task = run.option("--task")
    alike = [
        result["seconds"]
        for command, result in known.items()
        if "error" not in result and command.startswith(start) and result.get("task") == task
    ]
    return median(alike) if alike else seconds_per_step * steps(run)
