"""Figures: colours that colour-blind readers tell apart, with a marker of its own for each, in small SVG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999", "#661100")
MARKERS = "osD^vP*X<"
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "peft-child", "font.size": 10, "legend.frameon": False}


def save(figure: Figure, file: Path) -> None:
    """Write a figure; equal figures are equal files."""
    with mpl.rc_context(STYLE):
        figure.savefig(file, metadata={"Date": None})


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one empty panel, sizes in inches."""
    figure, (axes,) = blank_row(width, height, 1)
    return figure, axes


def blank_row(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with a row of empty panels, sizes in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def explain(axes: Axes, **where: Any) -> None:
    """A legend, if there is anything to explain."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**where)
