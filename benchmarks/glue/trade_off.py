"""What adapting to a new domain costs on the old one, at every learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from benchmarks.glue.figures import draw_trade_off
from benchmarks.grid.curves import old_where_new_is
from benchmarks.grid.runs import Known, Run, Source, succeeded
from benchmarks.grid.tables import MISSING, failures, markdown, mean_and_deviation, of_seeds


EQUAL = (90.0, 80.0, 70.0)  # perplexities on the new domain at which methods are compared


@dataclass(frozen=True)
class Forgetting:
    """What adapting a small language model to prose costs on source code, at several learning rates."""

    source: Source
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()

    METHODS: ClassVar[dict[str, tuple[tuple[str, ...], tuple[float, ...]]]] = {
        "Full": (("--method", "full"), (1e-4, 3e-4, 1e-3, 3e-3)),
        **{
            f"CT_D {density}": (("--method", "child", "--density", density), (1e-3, 3e-3, 1e-2, 3e-2))
            for density in ("0.01", "0.03", "0.1", "0.3")
        },
        "CT_F 0.3": (("--method", "task_free", "--density", "0.3"), (1e-4, 3e-4, 1e-3, 3e-3)),
        "Random 0.1": (("--method", "random", "--density", "0.1"), (1e-3, 3e-3, 1e-2, 3e-2)),
        "LoRA r=16": (("--method", "lora", "--rank", "16"), (1e-3, 3e-3, 1e-2, 3e-2)),
    }

    def runs(self, known: Known) -> Iterator[Run]:
        """Every method at every rate with every seed, and the base model."""
        yield self._base()
        for method in self.METHODS:
            for rate in self.METHODS[method][1]:
                yield from self._cell(method, rate)

    def least_runs(self, known: Known) -> Iterator[Run]:
        """All runs."""
        return self.runs(known)

    def _base(self) -> Run:
        return Run("forgetting", ("--method", "base", *self.options))

    def _cell(self, method: str, rate: float) -> list[Run]:
        options = (*self.METHODS[method][0], *self.options, "--learning-rate", f"{rate:g}")
        return [Run("forgetting", (*options, "--seeds", str(seed))) for seed in self.seeds]

    def write(self, known: Known, folder: Path) -> None:
        """Write forgetting.md and forgetting.svg."""
        base = known.get(self._base().command(self.source), {}).get("metrics", {})
        points: dict[str, list[tuple[float, float]]] = {}
        paths: dict[str, dict[int, list[tuple[float, float]]]] = {method: {} for method in self.METHODS}
        rows = [["Base", MISSING, *(f"{base.get(domain, float('nan')):.1f}" for domain in ("new", "old")), "0"]]
        for method, (_, rates) in self.METHODS.items():
            for rate in rates:
                found = succeeded(self._cell(method, rate), self.source, known)
                by_domain = {
                    domain: {result["seed"]: result["metrics"][domain] for result in found}
                    for domain in ("new", "old")
                }
                cells = [mean_and_deviation(values, len(self.seeds)) for values in by_domain.values()]
                rows.append([method, f"{rate:g}", *cells, f"{found[0]['entries']:,}" if found else MISSING])
                for result in found if base else ():
                    path = paths[method].setdefault(result["seed"], [(base["new"], base["old"])])
                    path.append((result["metrics"]["new"], result["metrics"]["old"]))
                if found:
                    new, old = (fmean(values.values()) for values in by_domain.values())
                    if not base or new < base["new"]:
                        points.setdefault(method, []).append((new, old))
        if base:
            points["Base"] = [(base["new"], base["old"])]
        draw_trade_off(points, folder / "forgetting.svg")
        equal = [[method, *(self._at_equal_learning(paths[method], new) for new in EQUAL)] for method in self.METHODS]
        head = ["method", "learning rate", "new domain", "old domain", "trained entries"]
        page = (
            "# Learning and forgetting\n\nThe language model of `examples/quickstart.py`, trained on the source code "
            "of Python's standard library (the old domain) and adapted to the prose of the language reference (the "
            f"new one). Perplexity on held-out text, {of_seeds('mean and standard deviation', len(self.seeds))}. No "
            "learning rate is chosen: each is a point of the figure, and further down on the left is better. What is "
            "worse than the base on the new domain is only in the table.\n\n"
            f"![Perplexity on both domains](forgetting.svg)\n\n{markdown(head, rows)}\n"
            "Perplexity on the old domain when that on the new one has come down to a value, interpolated (in the "
            "logarithms) between the learning rates of each seed, those beyond the best left out:\n\n"
            f"{markdown(['method', *(f'new domain at {new:g}' for new in EQUAL)], equal)}"
            f"{failures(self.runs(known), self.source, known)}"
        )
        (folder / "forgetting.md").write_text(page, "utf-8")

    def _at_equal_learning(self, paths: dict[int, list[tuple[float, float]]], new: float) -> str:
        found = {seed: old_perplexity(path, new) for seed, path in paths.items()}
        return mean_and_deviation({seed: old for seed, old in found.items() if old is not None}, len(self.seeds))


def old_perplexity(path: Sequence[tuple[float, float]], new: float) -> float | None:
    """Perplexity on the old domain where that on the new one comes down to `new`, or None if it never does.

    Args:
        path: Perplexities on the new and the old domain, from the base model on, by growing learning rate.
        new: Perplexity on the new domain.
    """
    found = old_where_new_is([(log(first), log(second)) for first, second in path], log(new))
    return None if found is None else exp(found)
