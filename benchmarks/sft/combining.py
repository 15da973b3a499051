"""Two tasks in one model, for several methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.grid.runs import Known, Run, succeeded
from benchmarks.grid.search import Method
from benchmarks.grid.tables import circumstances, failures, markdown, mean_and_deviation, of_seeds
from benchmarks.sft.sweep import Sweep


@dataclass(frozen=True)
class Combining:
    """Adapters of two tasks, each at the best rate of its sweep, put together in several ways.

    Attributes:
        first: The sweep of the first task.
        second: The sweep of the second.
        methods: What is compared, in both.
    """

    first: Sweep
    second: Sweep
    methods: tuple[Method, ...]

    def runs(self, known: Known) -> Iterator[Run]:
        """The runs that can be planned with what is known, those that choose the rates first."""
        yield from self._searches(known)
        for method in self.methods:
            yield from self._runs(method, known)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs; where no rate is chosen yet, with any."""
        yield from self._searches(known)
        for method in self.methods:
            yield from self._runs(method, known, method.rates[0])

    def _searches(self, known: Known) -> Iterator[Run]:
        for sweep in (self.first, self.second):
            for method in self.methods:
                for rate in sweep.rates(method, known):
                    yield sweep.run(method, rate, sweep.seeds[0])

    def _runs(self, method: Method, known: Known, rate: float | None = None) -> list[Run]:
        first, second = (sweep.best_rate(method, known) or rate for sweep in (self.first, self.second))
        if first is None or second is None:
            return []
        others = ("--second", *self.second.task.words(self.second.source))
        rates = ("--learning-rate", f"{first:g}", "--second-learning-rate", f"{second:g}")
        options = (*self.first.settings(method), *others, *rates)
        return [Run("sft_combine", (*options, "--seeds", str(seed))) for seed in self.first.seeds]

    def write(self, known: Known, folder: Path) -> None:
        """Write combined.md."""
        source, seeds = self.first.source, self.first.seeds
        rows, base, made = [], None, []
        for method in self.methods:
            results = succeeded(self._runs(method, known), source, known)
            made += results
            if results:
                base = results[0]["base"]
            for name in results[0]["combined"] if results else ():
                shown = {"first": "the first alone", "second": "the second alone"}.get(name, name)
                rows.append([method.name, shown, *_losses(results, name, len(seeds))])
        if base:
            rows.insert(0, ["base model", "", *(f"{loss:.3f}" for loss in base)])
        head = ["method", "combination", self.first.task.name, self.second.task.name, "old text"]
        page = (
            "# Two tasks in one model\n\nAn adapter is trained for each task by itself, at the best learning rate of "
            "its own table, and both are put together with `add_weighted_adapter`: with weights of a half (mean) or "
            "of one (sum), and with TIES and DARE at weights of one, each keeping half of the values. Input channels "
            "are combined whole: with TIES over signs alone, and without DARE. Of LoRA, PEFT's `linear` adds the "
            "factors of the two adapters, so that products of one with the other come in; the exact mean and sum "
            "(`cat`) have twice the rank. Loss per token, "
            f"{of_seeds('mean and standard deviation', len(seeds))}; lower is better.\n\n"
            f"{markdown(head, rows)}\n{circumstances(made)}{failures(self.runs(known), source, known)}"
        )
        (folder / "combined.md").write_text(page, "utf-8")


def _losses(results: list[Mapping[str, Any]], combination: str, wanted: int) -> list[str]:
    """On the text of the first task, on that of the second, and on old text."""
    texts = range(3)
    by_seed = [{result["seed"]: result["combined"][combination][text] for result in results} for text in texts]
    return [mean_and_deviation(losses, wanted, 3) for losses in by_seed]
