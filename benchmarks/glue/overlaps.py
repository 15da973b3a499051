"""How much the child networks of tasks share, after Figure 3 of the paper, and those that few examples choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.glue.figures import draw_matrix, draw_overlap_by_examples
from benchmarks.glue.tasks import title
from benchmarks.grid.runs import Known, Run, Source, succeeded
from benchmarks.grid.tables import failures, markdown, mean_and_deviation, of_seeds


FEW = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Overlaps:
    """How much child networks share that are chosen from different tasks, or from few examples."""

    source: Source
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    density: float = 0.3

    def runs(self, known: Known) -> Iterator[Run]:
        """One run for each seed compares all tasks, and one for each seed and task the numbers of examples."""
        common = ("--density", f"{self.density:g}", "--num-fisher-examples", "512", "--max-train-examples", "1000")
        for seed in self.seeds:
            more = ("--others", *self.tasks[1:], "--seeds", str(seed))
            yield Run("children", ("--task", self.tasks[0], *common, *more))
            for task in self.tasks:
                more = ("--few", *map(str, FEW), "--seeds", str(seed))
                yield Run("children", ("--task", task, *common, *more))

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs."""
        return self.runs(known)

    def write(self, known: Known, folder: Path) -> None:
        """Write overlap.md with a heat map of the tasks and a curve over the number of examples."""
        done = succeeded(self.runs(known), self.source, known)
        titles = {task: title(task) for task in self.tasks}
        pairs = {
            (titles[one], titles[other]): _mean(_by_seed(done, "tasks", f"{one} {other}"))
            for one, other in combinations(self.tasks, 2)
        }
        itself = {(name, name): _mean(_by_seed(done, "rows", task)) for task, name in titles.items()}
        few = {
            task: {name: _by_seed(done, "examples", name, task) for name in (*map(str, FEW), "authors")}
            for task in self.tasks
        }
        label = "share of one child network in the other"
        draw_matrix([*titles.values()], pairs | itself, label, folder / "overlap.svg")
        curves = {titles[task]: {count: _mean(few[task][str(count)]) for count in FEW} for task in self.tasks}
        draw_overlap_by_examples(curves, folder / "overlap_examples.svg")
        again = [
            [name, *(self._cell(_by_seed(done, kind, task)) for kind in ("rows", "head", "both"))]
            for task, name in titles.items()
        ]
        rows = [[titles[task], *map(self._cell, few[task].values())] for task in self.tasks]
        statistic = of_seeds("mean and standard deviation", len(self.seeds))
        page = (
            f"# Overlap of child networks\n\nModel: `{self.source.shown().model}`. Two child networks of density "
            f"{self.density:g} share {self.density:g} of their entries by chance. Below, the share of one that is in "
            f"the other, {statistic}, 512 examples each.\n\nBetween tasks, with the same untrained head if they "
            "have as many labels; a task with itself from other rows, with the same head:\n\n"
            "![Overlap of tasks](overlap.svg)\n\n"
            "The share, in percent, of a child network that is in another one for the same task:\n\n"
            f"{markdown(['task', 'other rows', 'other head', 'both'], again)}\n"
            "The share, in percent, of the child network that 1,000 examples choose which is in the one that fewer "
            f"choose, or the same 1,000 by the authors' code:\n\n{markdown(['task', *few[self.tasks[0]]], rows)}\n"
            f"![Overlap by number of examples](overlap_examples.svg)\n{failures(self.runs(known), self.source, known)}"
        )
        (folder / "overlap.md").write_text(page, "utf-8")

    def _cell(self, shares: Mapping[int, float]) -> str:
        return mean_and_deviation({seed: 100 * share for seed, share in shares.items()}, len(self.seeds))


def _by_seed(results: Sequence[Mapping[str, Any]], kind: str, name: str, task: str | None = None) -> dict[int, float]:
    """A share of every run that has measured it, of one task or of all, by seed."""
    found = [result for result in results if task in (None, result["task"])]
    return {
        result["seed"]: result["overlaps"][kind][name] for result in found if name in result["overlaps"].get(kind, {})
    }


def _mean(shares: Mapping[int, float]) -> float:
    return fmean(shares.values()) if shares else float("nan")
