"""How the score depends on the learning rate, for child networks of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.glue.figures import draw_rates
from benchmarks.glue.grid import Grid, task_score
from benchmarks.glue.tasks import title
from benchmarks.grid.runs import Known, Run, succeeded
from benchmarks.grid.tables import failures, markdown, mean_and_deviation, of_seeds


@dataclass(frozen=True)
class Rates:
    """Every method of a grid at the same learning rates, with no search for the best.

    Attributes:
        grid: The tasks, the methods and the seeds.
        rates: Learning rates.
        amount: How much the runs train, in words.
    """

    grid: Grid
    rates: Sequence[float]
    amount: str

    def runs(self, known: Known) -> Iterator[Run]:
        """Every method at every rate with every seed, on one task after the other."""
        for task in self.grid.tasks:
            for method in self.grid.methods:
                for rate in self.rates:
                    yield from self.grid.reported(task, method, rate)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs."""
        return self.runs(known)

    def write(self, known: Known, folder: Path) -> None:
        """Write rates.md and rates.svg."""
        scores = {
            (task, method.name, rate): {
                result["seed"]: task_score(result)
                for result in succeeded(self.grid.reported(task, method, rate), self.grid.source, known)
            }
            for task in self.grid.tasks
            for method in self.grid.methods
            for rate in self.rates
        }
        names = [method.name for method in self.grid.methods]
        wanted = len(self.grid.seeds)
        rows = [
            [title(task), name, *(mean_and_deviation(scores[task, name, rate], wanted) for rate in self.rates)]
            for task in self.grid.tasks
            for name in names
        ]
        curves = {
            title(task): {
                name: {rate: list(scores[task, name, rate].values()) for rate in self.rates} for name in names
            }
            for task in self.grid.tasks
        }
        draw_rates(curves, folder / "rates.svg")
        page = (
            f"# Learning rates\n\n{self.amount} Model: `{self.grid.source.shown().model}`. "
            f"{of_seeds('Mean and standard deviation', wanted)} on the validation split, in percent, at every "
            "learning rate; none is chosen.\n\n"
            f"{markdown(['task', 'method', *(f'{rate:g}' for rate in self.rates)], rows)}\n"
            f"![Scores by learning rate](rates.svg)\n{failures(self.runs(known), self.grid.source, known)}"
        )
        (folder / "rates.md").write_text(page, "utf-8")
