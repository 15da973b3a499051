"""Slopes of what was measured against the size of the model, the density and the batch, and what they predict."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tables import made_with, ms, table


LARGE = {"1B": 1e9, "7B": 7e9, "70B": 70e9}  # weights
STEEP = 1.1  # exponents above it are not linear
PHASES = (
    "pass, native",
    "pass, ours",
    "optimizer",
    "inference, native",
    "inference",
    "Fisher pass",
    "choice",
    "add an adapter",
    "save",
    "load",
    "merge",
    "unmerge",
    "merged switch",
)


class Fit(NamedTuple):
    """Least squares of relative errors.

    Attributes:
        exponent: Of a power law through all points.
        last: Of one through the last two.
        slope: Of a straight line.
        start: Of the line, at zero.
        error: Largest relative error of the line.
    """

    exponent: float
    last: float
    slope: float
    start: float
    error: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> "Fit":
        """Fit `y` to `x`, both positive."""
        x, y = np.array(x, float), np.array(y, float)
        exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
        last = np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])
        slope, start = np.polyfit(x, y, 1, w=1 / y)
        return cls(exponent, last, slope, start, np.abs((slope * x + start) / y - 1).max())

    def exponents(self) -> list[str]:
        """Both exponents, in bold if they are steep."""
        return [f"**{value:.2f}**" if value > STEEP else f"{value:.2f}" for value in (self.exponent, self.last)]

    def at(self, x: float) -> float:
        """What the line predicts."""
        return self.slope * x + self.start


def growth(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    return "\n\n".join(
        [
            "## How cost grows",
            made_with(results),
            f"A Llama, float32, a random child network of density 0.1, {results['size'][0]['tokens']} tokens. A pass "
            "is forward and backward; the Fisher pass takes two examples. Exponents are those of a power law through "
            "all points, and through the last two; above 1.1 they are bold. Predictions go along a straight line, in "
            "seconds on this machine, if it had the memory.",
            by_size(results["size"]),
            "Peak memory above the base model, in MB, each in a fresh process; predictions in GB.",
            memory_by_size(results["size"]),
            *_of_channels(results),
            f"A model of {results['density'][0]['weights']:,} weights by density; milliseconds.",
            by_other(results["density"], "density", PHASES),
            f"The same model by tokens in a batch, density {results['batch'][0]['density']}; milliseconds.",
            by_other(results["batch"], "tokens", PHASES[:5]),
        ]
    )


def _of_channels(results: Mapping[str, Any]) -> list[str]:
    """The same tables for input channels."""
    points = results.get("size, channels", [])
    return points and ["The same with input channels.", by_size(points), memory_by_size(points)]


def by_size(points: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of each phase by weights, with predictions."""
    weights = [point["weights"] for point in points]
    rows = []
    for phase in PHASES:
        fit = Fit.of(weights, [median(point["seconds"][phase]) for point in points])
        row = [phase, *(ms(point["seconds"][phase]) for point in points), *fit.exponents()]
        row += [f"{1e9 * fit.slope:.3g}", f"{fit.error:.0%}"]
        rows.append([*row, *(f"{fit.at(large):.3g}" for large in LARGE.values())])
    head = ["ms", *(f"{number / 1e6:.0f}M" for number in weights), "exponent", "last", "ns per weight", "error"]
    return table([*head, *(f"{name}, s" for name in LARGE)], rows)


def memory_by_size(points: Sequence[Mapping[str, Any]]) -> str:
    """Peak memory by weights, with predictions."""
    weights = [point["weights"] for point in points]
    rows = []
    for phase in points[0]["peaks"]:
        peaks = [max(point["peaks"][phase], 1) for point in points]
        fit = Fit.of(weights, peaks)
        row = [phase, *(f"{peak / 1e6:.0f}" for peak in peaks), *fit.exponents()]
        rows.append([*row, f"{fit.slope:.2f}", *(f"{fit.at(large) / 1e9:.3g}" for large in LARGE.values())])
    head = ["MB", *(f"{number / 1e6:.0f}M" for number in weights), "exponent", "last", "bytes per weight"]
    return table([*head, *(f"{name}, GB" for name in LARGE)], rows)


def by_other(points: Sequence[Mapping[str, Any]], axis: str, phases: Sequence[str]) -> str:
    """Milliseconds of each phase by density or tokens."""
    values = [point[axis] for point in points]
    rows = []
    for phase in phases:
        fit = Fit.of(values, [median(point["seconds"][phase]) for point in points])
        rows.append([phase, *(ms(point["seconds"][phase]) for point in points), *fit.exponents()])
    return table(["ms", *map(str, values), "exponent", "last"], rows)
