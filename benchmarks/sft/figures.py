"""The figures of the language model's experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid.figures import COLOURS, MARKERS, blank, blank_row, explain, save


OUTSIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}


def draw_learning_and_forgetting(courses: Mapping[str, Sequence[Sequence[tuple[float, float]]]], file: Path) -> None:
    """Loss on old text over loss on new text: a line for each training, without its first point, the base model.

    The axes leave out trainings that have diverged.

    Args:
        courses: By method, the losses on new and old text along each training.
        file: The SVG file to write.
    """
    figure, axes = blank(7.5, 4.8)
    for place, (name, found) in enumerate(courses.items()):
        style: Any = {"color": COLOURS[place % 9], "linewidth": 1}
        for number, points in enumerate(found):
            new, old = zip(*points[1:], strict=True)
            axes.plot(new, old, linestyle="-" if place < 9 else "--", label=None if number else name, **style)
            axes.plot(new[-1:], old[-1:], MARKERS[place % 9], **style)
    ends = [points[-1] for found in courses.values() for points in found]
    if ends:
        best_new = sorted(new for new, _ in ends)
        middle = best_new[len(best_new) // 2]
        lowest = min(old for _, old in ends)
        axes.set_xlim(best_new[0] - 0.02, middle + 3 * (middle - best_new[0]) + 0.02)
        axes.set_ylim(lowest - 0.05, lowest + 1.5)
    axes.set(xlabel="loss on new text (lower has learnt more)", ylabel="loss on old text (lower has forgotten less)")
    explain(axes, **OUTSIDE)
    save(figure, file)


def draw_losses(losses: Mapping[str, Mapping[float, tuple[float, float]]], file: Path) -> None:
    """Two panels, losses on new and on old text by learning rate.

    Args:
        losses: By method and rate, on new and on old text.
        file: The SVG file to write.
    """
    figure, panels = blank_row(10, 3.6, 2)
    for number, (axes, text) in enumerate(zip(panels, ("new", "old"), strict=True)):
        for place, (name, by_rate) in enumerate(losses.items()):
            style: Any = {"color": COLOURS[place % 9], "marker": MARKERS[place % 9], "markersize": 4, "linewidth": 1}
            line = "-" if place < 9 else "--"
            values = [both[number] for both in by_rate.values()]
            axes.plot(list(by_rate), values, linestyle=line, label=name, **style)
        found = sorted(both[number] for by_rate in losses.values() for both in by_rate.values())
        if found:
            axes.set_ylim(found[0] - 0.03, found[len(found) // 2] + 3 * (found[len(found) // 2] - found[0]) + 0.03)
        axes.set(xscale="log", xlabel="learning rate", ylabel=f"loss on {text} text")
    explain(panels[-1], **OUTSIDE)
    save(figure, file)
