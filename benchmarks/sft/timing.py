"""What a training step costs, for several methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.grid.runs import Known, Run, succeeded
from benchmarks.grid.search import Method
from benchmarks.grid.tables import circumstances, failures, markdown
from benchmarks.sft.sweep import Sweep


@dataclass(frozen=True)
class Timing:
    """Steps of methods, each in turns with those of LoRA with r = 16.

    Attributes:
        sweep: Has the model, the task, the options and the seeds, of which the first is taken.
        methods: What is compared.
    """

    sweep: Sweep
    methods: tuple[Method, ...]

    def runs(self, known: Known) -> Iterator[Run]:
        """One for each method."""
        for method in self.methods:
            yield Run("sft_steps", (*self.sweep.settings(method), "--seeds", str(self.sweep.seeds[0])))

    least_runs = runs

    def write(self, known: Known, folder: Path) -> None:
        """Write steps.md."""
        source, runs = self.sweep.source, list(self.runs(known))
        found = [(method, succeeded([run], source, known)) for method, run in zip(self.methods, runs, strict=True)]
        rows = [[method.name, *_shown(results[0])] for method, results in found if results]
        page = (
            "# Seconds of a training step\n\nForward, backward and optimizer on one batch of "
            f"{self.sweep.task.title}, each method in turns with LoRA with r=16 in the same process: the ratios "
            "within a turn, and the median seconds of both. Model: "
            f"`{source.shown().model}`.\n\n"
            f"{markdown(['method', 'ratio: median', 'least', 'most', 'seconds', 'of LoRA', 'turns', 'tokens'], rows)}"
            f"\n{circumstances(succeeded(runs, source, known))}{failures(runs, source, known)}"
        )
        (folder / "steps.md").write_text(page, "utf-8")


def _shown(result: Mapping[str, Any]) -> list[str]:
    own, lora = (result["steps"][name] for name in ("own", "lora"))
    ratios = sorted(one / other for one, other in zip(own, lora, strict=True))
    numbers = (median(ratios), ratios[0], ratios[-1], median(own), median(lora))
    return [*(f"{number:.2f}" for number in numbers), str(len(own)), f"{result['tokens']:,}"]
