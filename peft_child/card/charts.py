"""Charts of adapters for plotly.js, as dictionaries: heat maps of layers by modules, and a histogram of deltas.

Names of parameters come from files of others. plotly.js reads tags and entities in every text that it shows, so they
are escaped here; as keys it only gets numbers of ours, since a module may be called `__proto__`.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_child.card.delta_counts import EDGES, FIRST, STEPS, DeltaCounts
from peft_child.card.plot import Place, grouped
from peft_child.tensors.delta import ChildSize, Overlap, total_size


# Pixels
ROW = 20  # height of a layer
COLUMN = 26  # least width of a module; with more modules than fit on the screen, the chart is scrolled
LETTER = 7
MARGINS = {"l": 70, "r": 10, "t": 45, "b": 80}  # axes and their titles; below a heat map its color bar
COLOR_BAR = 240  # length
HISTOGRAM = 320

LABEL = 30  # letters of a name on an axis; of longer names the end is shown
HOVER = 180  # letters of a name in a hover label
HOVER_LINE = 36  # letters, for narrow screens
MAX_DECADES = 8  # with a label on the axis

GREY, DARK, LIGHT = "#d9d9d9", "#31446b", "#d3c164"  # the last two from cividis, apart for every reader
FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#222222"}


class Chart(NamedTuple):
    """One chart.

    Attributes:
        data: The traces of plotly.js.
        layout: Its layout.
        height: In pixels.
        min_width: In pixels.
    """

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    min_width: int = 0


class _Cell(NamedTuple):
    percent: float
    lines: list[str]  # of its hover label, below the module's and the layer's


def plain(text: object) -> str:
    """One line without control characters: names and messages may come from untrusted files."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(str(text).split()))


def child_network_chart(sizes: Mapping[str, ChildSize], sums: Mapping[str, float]) -> Chart:
    """A heat map of the share of chosen entries, layers by modules.

    Args:
        sizes: Sizes of child networks by name of the parameter; at least one.
        sums: Sums of the absolute deltas by name of the parameter.
    """
    absolute = _by_place(sums)
    return _heat_map(
        {place: _child_cell(total_size(found), sum(absolute[place])) for place, found in _by_place(sizes).items()},
        "chosen entries (%)",
    )


def _child_cell(size: ChildSize, absolute_sum: float) -> _Cell:
    percent = 100 * size.density
    lines = [
        f"chosen: {percent:.3g}%",
        f"chosen entries: {size.chosen:,}",
        f"targeted entries: {size.numel:,}",
        f"mean |delta|: {absolute_sum / max(1, size.chosen):.3g}",
    ]
    return _Cell(percent, lines)


def overlap_chart(overlaps: Mapping[str, Overlap]) -> Chart:
    """A heat map of the Jaccard indices of two adapters, layers by modules.

    Args:
        overlaps: How two child networks overlap, by name of the parameter; at least one.
    """
    totals = {place: sum(found, start=Overlap(0, 0, 0, 0)) for place, found in _by_place(overlaps).items()}
    return _heat_map({place: _overlap_cell(total) for place, total in totals.items()}, "Jaccard index (%)")


def _overlap_cell(overlap: Overlap) -> _Cell:
    percent = 100 * overlap.jaccard
    lines = [
        f"Jaccard index: {percent:.3g}%",
        f"in both: {overlap.shared:,}",
        f"in either: {overlap.first + overlap.second - overlap.shared:,}",
        f"in the first: {overlap.first:,}",
        f"in the second: {overlap.second:,}",
        f"shared, times chance: {overlap.over_chance:.3g}",
    ]
    return _Cell(percent, lines)


def delta_chart(counts: DeltaCounts) -> Chart:
    """A histogram of the sizes of deltas that are not zero, on a logarithmic axis; there must be one at least."""
    bins = sorted({*counts.decreases, *counts.increases})
    below, above = ([side.get(bin_, 0) for bin_ in bins] for side in (counts.decreases, counts.increases))
    edges = [*EDGES, math.inf]
    hover = [
        "<br>".join(
            [
                f"|delta| from {edges[bin_]:.3g} to {edges[bin_ + 1]:.3g}",
                f"below zero: {minus:,}",
                f"above zero: {plus:,}",
            ]
        )
        for bin_, minus, plus in zip(bins, below, above, strict=True)
    ]
    bars = {
        "type": "bar",
        "x": [bin_ + FIRST + 0.5 for bin_ in bins],
        "width": 1,
        "hoverinfo": "text",
        "hovertext": hover,
    }
    traces = [
        {**bars, "name": "delta &lt; 0", "y": below, "marker": {"color": DARK, "line": {"width": 0}}},
        {**bars, "name": "delta &gt; 0", "y": above, "marker": {"color": LIGHT, "line": {"width": 0}}},
    ]
    first, last = bins[0] + FIRST, bins[-1] + FIRST + 1
    decades = range(math.floor(first / STEPS), math.ceil(last / STEPS) + 1)
    labelled = decades[:: math.ceil(len(decades) / MAX_DECADES)]
    layout = {
        **_layout("|delta|, in the unit of the weights<br>(logarithmic scale)", "deltas in each range"),
        "barmode": "stack",
        "bargap": 0,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
    layout["xaxis"] |= {
        "tickvals": [decade * STEPS for decade in labelled],
        "ticktext": [f"10<sup>{decade}</sup>".replace("-", "\N{MINUS SIGN}") for decade in labelled],
        "range": [first - 1, last + 1],
        "ticks": "outside",
    }
    layout["yaxis"] |= {"tickformat": ",", "gridcolor": GREY}
    if max(map(sum, zip(below, above, strict=True))) < 6:
        layout["yaxis"]["dtick"] = 1  # else there would be fractions of a delta
    return Chart(traces, layout, HISTOGRAM)


def _by_place(values: Mapping[str, Any]) -> dict[Place, list[Any]]:
    return grouped(values, lambda place: place)


def _heat_map(cells: Mapping[Place, _Cell], unit: str) -> Chart:
    """Layers by modules; cells without a child network are grey."""
    layers, kinds = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
    found = [[cells.get(Place(layer, kind)) for kind in kinds] for layer in layers]
    names = {f"module {number}": _end_of(kind, LABEL) for number, kind in enumerate(kinds)}
    trace = {
        "type": "heatmap",
        "x": list(names),
        "y": ["none" if layer is None else str(layer) for layer in layers],
        "z": [[cell and cell.percent for cell in row] for row in found],
        "hovertext": [
            [_hover(layer, kind, cell) for kind, cell in zip(kinds, row, strict=True)]
            for layer, row in zip(layers, found, strict=True)
        ],
        "hoverinfo": "text",
        "hoverongaps": False,
        "texttemplate": "%{z:.3~g}",
        "xgap": 1,
        "ygap": 1,
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": max(cell.percent for cell in cells.values()) or 1,
        "colorbar": {
            "orientation": "h",
            "thickness": 12,
            "lenmode": "pixels",
            "len": COLOR_BAR,
            "x": 0,
            "xanchor": "left",
            "xpad": 0,
            "y": 0,
            "yanchor": "top",
            "ypad": 12,
            "title": {"text": unit, "side": "top"},
        },
    }
    layout = _layout("module", "layer")
    category = {"type": "category", "ticks": "", "ticklabelstandoff": 4, "showgrid": False}
    layout["xaxis"] |= {
        **category,
        "side": "top",
        "tickangle": -90,
        "labelalias": {key: html.escape(name, quote=False) for key, name in names.items()},
    }
    layout["yaxis"] |= {**category, "autorange": "reversed"}
    labels = LETTER * max(map(len, names.values()))
    layout |= {"plot_bgcolor": GREY, "margin": {**MARGINS, "t": MARGINS["t"] + labels}}
    height = max(3, len(layers)) * ROW + labels + MARGINS["t"] + MARGINS["b"]
    return Chart([trace], layout, height, len(kinds) * COLUMN + MARGINS["l"] + MARGINS["r"])


def _layout(xtitle: str, ytitle: str) -> dict[str, Any]:
    """What the charts have in common; they cannot be zoomed, so that a finger on them scrolls the page."""
    axis = {"automargin": True, "fixedrange": True, "zeroline": False}
    return {
        "xaxis": {**axis, "title": {"text": xtitle, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": ytitle, "standoff": 8}},
        "font": FONT,
        "hoverlabel": {"align": "left", "font": {"family": FONT["family"]}},
        "dragmode": False,
        "margin": MARGINS,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }


def _hover(layer: int | None, kind: str, cell: _Cell | None) -> str:
    if cell is None:
        return ""
    name = textwrap.wrap(_end_of(kind, HOVER), HOVER_LINE, break_on_hyphens=False)
    place = "outside the layers" if layer is None else f"layer {layer}"
    return "<br>".join(html.escape(line, quote=False) for line in [*name, place, *cell.lines])


def _end_of(name: str, length: int) -> str:
    name = plain(name)
    return name if len(name) <= length else f"...{name[-length:]}"
