"""The figures of the GLUE experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.grid.figures import COLOURS, MARKERS, blank, blank_row, explain, save
from benchmarks.grid.intervals import bootstrap_interval


def draw_differences(differences: Mapping[str, Mapping[str, Sequence[float]]], label: str, file: Path) -> None:
    """Mean differences with their intervals; `differences` by method and column, one number for each seed."""
    columns = list(dict.fromkeys(column for row in differences.values() for column in row))
    figure, axes = blank(7, 1.2 + 0.22 * len(columns) * (len(differences) + 1))
    for place, (name, row) in enumerate(differences.items()):
        shift = 0.8 * ((place + 0.5) / len(differences) - 0.5)
        found = {columns.index(column): values for column, values in row.items() if len(values) > 1}
        means = [fmean(values) for values in found.values()]
        ends = np.array([bootstrap_interval(values) for values in found.values()]).reshape(-1, 2).T
        spread = np.abs(ends - means)
        style: Any = {"fmt": MARKERS[place], "color": COLOURS[place], "capsize": 3, "markersize": 6}
        axes.errorbar(means, [row + shift for row in found], xerr=spread, label=name, **style)
    axes.axvline(0, color="black", linewidth=1)
    for border in range(1, len(columns)):
        axes.axhline(border - 0.5, color="#CCCCCC", linewidth=0.8)
    axes.set_yticks(range(len(columns)), columns)
    axes.set_ylim(max(1, len(columns)) - 0.5, -0.5)
    axes.set_xlabel(label)
    explain(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, file)


def draw_matrix(names: Sequence[str], shares: Mapping[tuple[str, str], float], label: str, file: Path) -> None:
    """A heat map of numbers from 0 to 1 for pairs of names, with the numbers in it."""
    figure, axes = blank(2.2 + 0.8 * len(names), 1.2 + 0.7 * len(names))
    values = np.array(
        [[shares.get((one, other), shares.get((other, one), np.nan)) for other in names] for one in names]
    )
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.5 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label=label)
    save(figure, file)


def draw_trade_off(points: Mapping[str, Sequence[tuple[float, float]]], file: Path) -> None:
    """Perplexities on the new and the old domain by method, a point for each learning rate, joined in their order."""
    figure, axes = blank(7, 4.5)
    for place, (name, found) in enumerate(points.items()):
        new, old = zip(*found, strict=True)
        axes.plot(new, old, MARKERS[place % 9], color=COLOURS[place % 9], linestyle="-", linewidth=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="perplexity on the new domain (lower is better)")
    axes.set_ylabel("perplexity on the old domain (lower is better)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:.0f}")
    explain(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, file)


def draw_rates(scores: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], file: Path) -> None:
    """A panel for each task: the mean score by learning rate, and that of every seed as a small point.

    Args:
        scores: Scores by task, method and rate.
        file: The SVG file to write.
    """
    figure, panels = blank_row(3.4 * len(scores), 3.2, len(scores))
    for axes, (task, methods) in zip(panels, scores.items(), strict=True):
        for place, (name, by_rate) in enumerate(methods.items()):
            found = {rate: values for rate, values in by_rate.items() if values}
            style: Any = {"color": COLOURS[place], "marker": MARKERS[place]}
            axes.plot(list(found), [fmean(values) for values in found.values()], label=name, **style)
            each = [(rate, value) for rate, values in found.items() for value in values]
            axes.scatter([rate for rate, _ in each], [value for _, value in each], s=8, alpha=0.6, **style)
        rates = sorted({rate for by_rate in methods.values() for rate in by_rate})
        axes.set(title=task, xscale="log", xlabel="learning rate", xlim=(rates[0] / 1.5, rates[-1] * 1.5))
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel("score (%)")
    explain(panels[0])
    save(figure, file)


def draw_overlap_by_examples(points: Mapping[str, Mapping[int, float]], file: Path) -> None:
    """Overlap with the child network that all examples choose, by task and number of examples."""
    figure, axes = blank(6, 3.5)
    for place, (task, shares) in enumerate(points.items()):
        axes.plot(list(shares), list(shares.values()), MARKERS[place], color=COLOURS[place], linestyle="-", label=task)
    axes.set(xscale="log", xlabel="examples that choose", ylabel="share of the child network\nof all examples")
    axes.set_xticks(sorted({count for shares in points.values() for count in shares}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(0, 1)
    explain(axes)
    save(figure, file)
