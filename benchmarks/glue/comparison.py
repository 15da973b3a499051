"""A table of methods on tasks, the differences from one of them, the rates that were chosen, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.glue.figures import draw_differences
from benchmarks.glue.grid import Grid, task_score
from benchmarks.grid.runs import Known, Run, succeeded
from benchmarks.grid.search import Method, searched
from benchmarks.grid.tables import (
    MISSING,
    average,
    circumstances,
    difference,
    failures,
    markdown,
    mean_and_deviation,
    of_seeds,
    paired,
)


class Column(NamedTuple):
    """What a method is judged by: the score on the task that it is trained on, or elsewhere.

    Attributes:
        title: In tables.
        task: What is trained on.
        elsewhere: Where in the result to find the metrics instead: ("transfer" or "probes", a task).
    """

    title: str
    task: str
    elsewhere: tuple[str, str] | None = None

    def score(self, result: Mapping[str, Any]) -> float:
        """Mean of the metrics, in percent."""
        if self.elsewhere is None:
            return task_score(result)
        kind, task = self.elsewhere
        return task_score({"metrics": result[kind][task]})


@dataclass(frozen=True)
class Comparison:
    """An experiment with a grid; the first method is what the others are compared with.

    Attributes:
        name: Of its files.
        title: Heading of its page.
        text: What it shows.
        grid: The runs.
        columns: Of the table.
    """

    name: str
    title: str
    text: str
    grid: Grid
    columns: tuple[Column, ...]

    def runs(self, known: Known) -> Iterator[Run]:
        """What can be run with what is known."""
        return self.grid.runs(known)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """What there will be to run if no search goes on."""
        return self.grid.least_runs(known)

    def write(self, known: Known, folder: Path) -> None:
        """Write NAME.md and NAME.svg."""
        scores = {method.name: self._scores(method, known) for method in self.grid.methods}
        baseline = self.grid.methods[0].name
        others = {name: row for name, row in scores.items() if name != baseline}
        titles = [column.title for column in self.columns] + (["Average"] if len(self.columns) > 1 else [])
        wanted = len(self.grid.seeds)
        rows = [
            [name, *(mean_and_deviation(row[title], wanted) for title in titles), *self._costs(method, known)]
            for method, (name, row) in zip(self.grid.methods, scores.items(), strict=True)
        ]
        differences = [
            [name, *(difference(row[title], scores[baseline][title]) for title in titles)]
            for name, row in others.items()
        ]
        page = f"# {self.title}\n\n{self.text}\n\n{self._protocol()}\n\n"
        page += markdown(["method", *titles, "trained entries", "file (MB)", "seconds"], rows)
        page += f"\nDifference from {baseline}, with its interval:\n\n{markdown(['method', *titles], differences)}"
        page += f"\n![Differences from {baseline}]({self.name}.svg)\n"
        page += f"\nLearning rates tried, with their scores on held-out training rows:\n\n{self._rates(known)}"
        page += f"\n{self._reproduction(known)}\n{failures(self.runs(known), self.grid.source, known)}"
        (folder / f"{self.name}.md").write_text(page, "utf-8")
        drawn = {
            name: {title: paired(row[title], scores[baseline][title]) for title in titles}
            for name, row in others.items()
        }
        draw_differences(drawn, f"difference from {baseline} (points)", folder / f"{self.name}.svg")

    def _scores(self, method: Method, known: Known) -> dict[str, dict[int, float]]:
        """By column and seed."""
        grid = self.grid
        scores = {column.title: grid.scores(column.task, method, known, column.score) for column in self.columns}
        return scores | {"Average": average(list(scores.values()))}

    def _costs(self, method: Method, known: Known) -> list[str]:
        found = [run for task in self.grid.tasks for run in self.grid.results(task, method, known).values()]
        if not found:
            return [MISSING] * 3
        entries, size, seconds = (median(run[name] for run in found) for name in ("entries", "bytes", "seconds"))
        return [f"{entries:,.0f}", f"{size / 1e6:.1f}", f"{seconds:.0f}"]

    def _rates(self, known: Known) -> str:
        rows = []
        for method in dict.fromkeys(map(searched, self.grid.methods)):
            for task in self.grid.tasks:
                tried = self.grid.rates(task, method, known)
                score = partial(self.grid.search_score, task, method, known=known)
                best = self.grid.chosen_rate(task, method, known)
                cells = [_tried(rate, score(rate), rate == best) for rate in tried]
                at_end = " (at the end of what was tried)" if best in (tried[0], tried[-1]) else ""
                rows.append([method.name, task, ", ".join(cells) + at_end])
        return markdown(["method", "task", "rate: score"], rows)

    def _protocol(self) -> str:
        seeds = of_seeds("Mean and standard deviation", len(self.grid.seeds))
        return (
            f"Model: `{self.grid.source.shown().model}`. {seeds}, in percent, "
            "of the mean of the GLUE metrics of the task, on its validation split. A seed sets the training rows, the "
            "head, the order, dropout and the masks, alike for all methods. The learning rate is chosen for each "
            "method and task on a tenth of the training split, which the runs of the search do not train on. The "
            "intervals are paired bootstrap intervals over seeds (95 % nominal; with five seeds they cover about "
            "83 %, with ten 91 %). File: what one would share. Seconds: of a whole run, on whatever else the machine "
            "had to do."
        )

    def _reproduction(self, known: Known) -> str:
        """The command of the first cell, and what it gives."""
        task, method = self.grid.tasks[0], self.grid.methods[-1]
        results = self.grid.results(task, method, known)
        if not results:
            return ""
        seed, result = next(iter(results.items()))
        return (
            f"Every number can be had again, with one thread on the same machine. {method.name} on {task} with seed "
            f"{seed} is {task_score(result):.2f}:\n\n"
            f"```bash\nOMP_NUM_THREADS=1 {result['command']}\n```\n\n"
            f"{circumstances(succeeded(self.runs(known), self.grid.source, known))}"
        )


def _tried(rate: float, score: float | None, is_best: bool) -> str:
    text = f"{rate:g}: {MISSING if score is None else f'{score:.1f}'}"
    return f"**{text}**" if is_best else text
