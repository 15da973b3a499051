"""The figures of the language model's experiments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.grid.figures import COLOURS, MARKERS, blank, blank_row, explain, save


OUTSIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}


def draw_learning_and_forgetting(losses: Mapping[str, Mapping[float, tuple[float, float]]], file: Path) -> None:
    """Loss on old text over loss on new text: a point for each learning rate, joined in their order.

    The axes leave out what is far from the best.

    Args:
        losses: By method and rate, on new and on old text.
        file: The SVG file to write.
    """
    figure, axes = blank(7.5, 4.8)
    for place, (name, by_rate) in enumerate(losses.items()):
        new, old = zip(*by_rate.values(), strict=True)
        axes.plot(new, old, **_style(place), label=name)
    ends = [both for by_rate in losses.values() for both in by_rate.values()]
    if ends:
        best, least = (min(each) for each in zip(*ends, strict=True))
        axes.set_xlim(best - 0.01, best + 0.13)
        axes.set_ylim(least - 0.05, least + 0.85)
    axes.set(xlabel="loss on new text (lower has learnt more)", ylabel="loss on old text (lower has forgotten less)")
    explain(axes, **OUTSIDE)
    save(figure, file)


def _style(place: int) -> Any:
    """Colour, marker and line of a method; after nine methods the colours come again, with broken lines."""
    line = "-" if place < 9 else "--"
    return {
        "color": COLOURS[place % 9],
        "marker": MARKERS[place % 9],
        "markersize": 5,
        "linewidth": 1,
        "linestyle": line,
    }


def draw_losses(losses: Mapping[str, Mapping[float, tuple[float, float]]], file: Path) -> None:
    """Two panels, losses on new and on old text by learning rate.

    Args:
        losses: By method and rate, on new and on old text.
        file: The SVG file to write.
    """
    figure, panels = blank_row(10, 3.6, 2)
    for number, (axes, text) in enumerate(zip(panels, ("new", "old"), strict=True)):
        for place, (name, by_rate) in enumerate(losses.items()):
            axes.plot(list(by_rate), [both[number] for both in by_rate.values()], **_style(place), label=name)
        found = sorted(both[number] for by_rate in losses.values() for both in by_rate.values())
        if found:
            axes.set_ylim(found[0] - 0.03, found[len(found) // 2] + 3 * (found[len(found) // 2] - found[0]) + 0.03)
        axes.set(xscale="log", xlabel="learning rate", ylabel=f"loss on {text} text")
    explain(panels[-1], **OUTSIDE)
    save(figure, file)
