"""How much the child networks of tasks share, after Figure 3 of the paper, and those that few examples choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.glue.figures import draw_matrix, draw_overlap_by_examples
from benchmarks.glue.grid import Known
from benchmarks.glue.runs import Run, Source, succeeded
from benchmarks.glue.tables import failures, markdown, of_seeds, title


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
        pairs = {pair: _mean(done, "tasks", " ".join(pair)) for pair in combinations_with_replacement(self.tasks, 2)}
        names = [*map(str, FEW), "authors"]
        few = {
            task: {name: _mean([one for one in done if one["task"] == task], "examples", name) for name in names}
            for task in self.tasks
        }
        titles = [title(task) for task in self.tasks]
        draw_matrix(
            titles,
            {(title(one), title(other)): share for (one, other), share in pairs.items()},
            "share of one child network in the other",
            folder / "overlap.svg",
        )
        curves = {title(task): {int(n): few[task][n] for n in names[:-1]} for task in self.tasks}
        draw_overlap_by_examples(curves, folder / "overlap_examples.svg")
        rows = [[title(task), *(f"{few[task][name]:.2f}" for name in names)] for task in self.tasks]
        page = (
            f"# Overlap of child networks\n\nModel: `{self.source.shown().model}`. Two child networks of density "
            f"{self.density:g} share {self.density:g} of their entries by chance. Below, the share of one that is in "
            f"the other, {of_seeds('mean', len(self.seeds))}, 512 examples each; of a task with "
            "itself, chosen from other rows and with another untrained head.\n\n![Overlap of tasks](overlap.svg)\n\n"
            "The share of the child network that 1,000 examples choose which is in the one that fewer choose, or the "
            f"same 1,000 by the authors' code:\n\n{markdown(['task', *names], rows)}\n"
            f"![Overlap by number of examples](overlap_examples.svg)\n{failures(self.runs(known), self.source, known)}"
        )
        (folder / "overlap.md").write_text(page, "utf-8")


def _mean(results: list[Mapping[str, Any]], kind: str, name: str) -> float:
    shares = [result["overlaps"][kind][name] for result in results if name in result["overlaps"][kind]]
    return fmean(shares) if shares else float("nan")
