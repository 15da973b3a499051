"""Methods on a task: at several learning rates with one seed, and at the best of them with the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.grid.curves import Curve, old_where_new_is
from benchmarks.grid.runs import Known, Run, Source, succeeded
from benchmarks.grid.search import Method, rates_to_try, searched
from benchmarks.grid.tables import MISSING, circumstances, failures, markdown, mean_and_deviation, of_seeds
from benchmarks.sft.figures import draw_learning_and_forgetting, draw_losses


class Task(NamedTuple):
    """Rows to learn from.

    Attributes:
        name: Of the folder with train.jsonl and test.jsonl.
        title: In tables.
        hub: Its name on the Hub, and its configuration.
        columns: Of the prompt and of the completion, in the folder and on the Hub.
    """

    name: str
    title: str
    hub: tuple[str, ...]
    columns: tuple[tuple[str, str], tuple[str, str]]

    def options(self, source: Source) -> tuple[str, ...]:
        """For the command line of `examples/sft.py`."""
        *data, prompt, completion = self.words(source)
        return ("--data", *data, "--columns", prompt, completion)

    def words(self, source: Source) -> tuple[str, ...]:
        """Where its rows are and then its two columns, for options that take both."""
        data = (f"{source.data}/{self.name}",) if source.data else self.hub
        return (*data, *self.columns[source.data is None])


@dataclass(frozen=True)
class Sweep:
    """Every method at several learning rates with the first seed, and at the best of them with the other seeds.

    The best is the one with the lowest loss on new text.

    Attributes:
        name: Of its files.
        title: Heading of its page.
        text: What it shows.
        source: The model and the folder of the data.
        task: What is learnt.
        methods: What is compared.
        options: Settings that all runs have in common.
        seeds: The first tries all rates.
        equal: Losses on new text at which forgetting is compared.
    """

    name: str
    title: str
    text: str
    source: Source
    task: Task
    methods: tuple[Method, ...]
    options: tuple[str, ...]
    seeds: tuple[int, ...]
    equal: tuple[float, ...] = ()

    def runs(self, known: Known) -> Iterator[Run]:
        """The runs that can be planned with what is known, those of the first seed first."""
        for method in self.methods:
            for rate in self.rates(method, known):
                yield self.run(method, rate, self.seeds[0])
        for seed in self.seeds[1:]:
            for method in self.methods:
                rate = self.best_rate(method, known)
                if rate is not None:
                    yield self.run(method, rate, seed)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs there will be if no search goes on; where no rate is chosen yet, with any."""
        for method in self.methods:
            rates = self.rates(method, known)
            for rate in rates:
                yield self.run(method, rate, self.seeds[0])
            for seed in self.seeds[1:]:
                yield self.run(method, self.best_rate(method, known) or (*rates, *searched(method).rates)[0], seed)

    def run(self, method: Method, rate: float, seed: int) -> Run:
        """One cell."""
        return Run(method.script, (*self.settings(method), "--learning-rate", f"{rate:g}", "--seeds", str(seed)))

    def settings(self, method: Method) -> tuple[str, ...]:
        """What all cells of a method have in common on the command line."""
        return ("--model", self.source.model, *self.task.options(self.source), *self.options, *method.options)

    def rates(self, method: Method, known: Known) -> list[float]:
        """The rates to try, as far as can be said now; of a method that is `like` another, the other's best."""
        if method.like:
            rate = self.best_rate(method.like, known)
            return [] if rate is None else [rate]
        return rates_to_try(method, partial(self._best, method, known))

    def best_rate(self, method: Method, known: Known) -> float | None:
        """The rate with the lowest loss on new text, or None as long as some are to be tried."""
        return self._best(method, known, self.rates(method, known))

    def results(self, method: Method, known: Known) -> dict[int, Mapping[str, Any]]:
        """What the best rate gave, by seed."""
        rate = self.best_rate(method, known)
        runs = [] if rate is None else [self.run(method, rate, seed) for seed in self.seeds]
        return {result["seed"]: result for result in succeeded(runs, self.source, known)}

    def tried(self, method: Method, known: Known) -> dict[float, Mapping[str, Any]]:
        """What every rate gave with the first seed, by rate."""
        cells = {rate: self.run(method, rate, self.seeds[0]) for rate in self.rates(method, known)}
        found = {rate: succeeded([run], self.source, known) for rate, run in cells.items()}
        return {rate: results[0] for rate, results in found.items() if results}

    def _best(self, method: Method, known: Known, rates: Sequence[float]) -> float | None:
        runs = {rate: self.run(method, rate, self.seeds[0]).command(self.source) for rate in rates}
        if not runs or not all(command in known for command in runs.values()):
            return None
        done = {
            rate: known[command]["metrics"]["new"] for rate, command in runs.items() if "metrics" in known[command]
        }
        return min(done, key=lambda rate: done[rate]) if done else None

    def write(self, known: Known, folder: Path) -> None:
        """Write NAME.md, NAME.svg and NAME_rates.svg."""
        tried = {method.name: found for method in self.methods if (found := self.tried(method, known))}
        losses = {
            name: {rate: (result["metrics"]["new"], result["metrics"]["old"]) for rate, result in found.items()}
            for name, found in tried.items()
        }
        courses = {name: [course(result) for result in found.values()] for name, found in tried.items()}
        base = next((points[0][0] for points in courses.values() if points), None)
        draw_learning_and_forgetting(losses, folder / f"{self.name}.svg")
        draw_losses(losses, folder / f"{self.name}_rates.svg")
        page = f"# {self.title}\n\n{self.text}\n\n{self._protocol(base)}\n\n{self._main_table(known)}\n"
        page += f"![Loss on new and on old text]({self.name}.svg)\n"
        if self.equal:
            page += f"\n{self._equal_learning(courses)}"
        page += f"\n## Learning rates\n\n{self._rates_table(losses)}\n![Losses by rate]({self.name}_rates.svg)\n"
        page += f"\n{self._reproduction(known)}\n{failures(self.runs(known), self.source, known)}"
        (folder / f"{self.name}.md").write_text(page, "utf-8")

    def _protocol(self, base: tuple[float, float] | None) -> str:
        before = f" The base model has {base[0]:.3f} and {base[1]:.3f}." if base else ""
        return (
            f"Model: `{self.source.shown().model}`; {self.task.title}. The mean loss per token (in nats) on held-out "
            "completions of the task (new text) and on text that the model knew before (old text); lower is better."
            f"{before} The table has each method at the learning rate with the lowest loss on new text, "
            f"{of_seeds('mean and standard deviation', len(self.seeds))}; the rate was chosen with the first seed. A "
            "seed sets the order of the rows, the random masks and LoRA's matrices."
        )

    def _main_table(self, known: Known) -> str:
        rows = []
        wanted = len(self.seeds)
        for method in self.methods:
            results = self.results(method, known)
            if not results:
                continue
            by_text = ({seed: result["metrics"][text] for seed, result in results.items()} for text in ("new", "old"))
            entries, size = (median(result[key] for result in results.values()) for key in ("entries", "bytes"))
            rows.append(
                [
                    method.name,
                    f"{entries:,.0f}",
                    f"{self.best_rate(method, known):g}",
                    *(mean_and_deviation(values, wanted, 3) for values in by_text),
                    f"{size / 1e6:.1f}",
                ]
            )
        head = ["method", "trained values", "rate", "new text", "old text", "file (MB)"]
        return markdown(head, rows)

    def _equal_learning(self, courses: Mapping[str, Sequence[Curve]]) -> str:
        rows = [
            [name, *(_shown(least_forgotten(found, new)) for new in self.equal)] for name, found in courses.items()
        ]
        return (
            "## Forgetting at equal learning\n\nThe loss on old text where that on new text has come down to a value, "
            "interpolated along the training at each rate; the least of all rates, with the first seed:\n\n"
            f"{markdown(['method', *(f'new text at {new:g}' for new in self.equal)], rows)}"
        )

    def _rates_table(self, losses: Mapping[str, Mapping[float, tuple[float, float]]]) -> str:
        rates = sorted({rate for found in losses.values() for rate in found})
        rows = [
            [name, *(f"{found[rate][0]:.3f} / {found[rate][1]:.3f}" if rate in found else "" for rate in rates)]
            for name, found in losses.items()
        ]
        head = ["method", *(f"{rate:g}" for rate in rates)]
        return f"New text / old text at every rate that was tried, with the first seed:\n\n{markdown(head, rows)}"

    def _reproduction(self, known: Known) -> str:
        """The command of the first cell, and what it gives."""
        method = self.methods[0]
        results = self.results(method, known)
        if not results:
            return ""
        result = results[min(results)]
        return (
            f"Every number can be had again, with one thread on the same machine. {method.name} with seed "
            f"{result['seed']} is {result['metrics']['new']:.3f} / {result['metrics']['old']:.3f}:\n\n"
            f"```bash\nOMP_NUM_THREADS=1 {result['command']}\n```\n\n"
            f"{circumstances(succeeded(self.runs(known), self.source, known))}"
        )


def course(result: Mapping[str, Any]) -> Curve:
    """The losses on new and old text along a training."""
    return [(new, old) for _, new, old in result["curve"]]


def least_forgotten(courses: Sequence[Curve], new: float) -> float | None:
    """The least loss on old text where that on new text first comes down to a value; None if it never does.

    Args:
        courses: Of one method, each from the base model on.
        new: The loss on new text.
    """
    found = [old for points in courses if (old := old_where_new_is(points, new)) is not None]
    return min(found, default=None)


def _shown(loss: float | None) -> str:
    return MISSING if loss is None else f"{loss:.3f}"
