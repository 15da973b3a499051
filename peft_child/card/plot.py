"""Where a child network lies: its entries by layer and kind of module, as numbers and as a heat map.

Both follow from the names of parameters: `model.layers.3.mlp.up_proj.weight` is `mlp.up_proj` in layer 3. The first
number in a name counts the layers; later numbers, such as those of experts, are ignored.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

from peft_child.tensors.delta import ChildSize, total_size


# STACK.LAYER.KIND, where LAYER is the first number between dots: `model.layers` . `3` . `mlp.up_proj`.
LAYERED = re.compile(r"(?:(?P<stack>.+?)\.)?(?P<layer>[0-9]{1,6})\.(?P<kind>.+)", re.DOTALL)
NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a whole part of a dotted name
CELL = (0.75, 0.28)  # inches, enough for a number of three digits
LONGEST = 30  # inches; beyond it cells shrink, and are not annotated
MAX_LABELS = 100  # on one axis
MAX_LABEL = 50  # characters

Key = TypeVar("Key")
Value = TypeVar("Value")


class Place(NamedTuple):
    """Where a parameter is in a network.

    Attributes:
        layer: The number of its layer; None outside the layers, as for embeddings.
        kind: The module's name inside the layer, or its whole name outside the layers.
    """

    layer: int | None
    kind: str


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of every parameter by name, sorted by layer, with those outside the layers last, then by kind."""
    parts = {name: _split(name) for name in names}
    stacks = {stack for stack, layer, _ in parts.values() if layer is not None}
    # With several stacks of layers, such as an encoder and a decoder, the kind has to say which one it is in.
    places = {
        name: Place(layer, f"{stack}.*.{kind}" if layer is not None and len(stacks) > 1 else kind)
        for name, (stack, layer, kind) in parts.items()
    }
    return dict(sorted(places.items(), key=lambda item: (item[1].layer is None, item[1].layer or 0, item[1].kind)))


def _split(name: str) -> tuple[str, int | None, str]:
    """The name of the list of layers, the number of the layer, and the module's name in the layer."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    found = LAYERED.fullmatch(module)
    if found is None:
        return "", None, module
    return found["stack"] or "", int(found["layer"]), NUMBER.sub("*", found["kind"])


def grouped(values: Mapping[str, Value], key: Callable[[Place], Key]) -> dict[Key, list[Value]]:
    """Group values of parameters by something about their places.

    Args:
        values: Values by name of the parameter.
        key: What the places of a group have in common.

    Returns:
        The groups, in the order of `places_of`, whatever the order of `values`.
    """
    groups: dict[Key, list[Value]] = {}
    for name, place in places_of(values).items():
        groups.setdefault(key(place), []).append(values[name])
    return groups


def draw_child_network(sizes: Mapping[str, ChildSize], path: str | Path) -> None:
    """Draw the share of chosen entries, layers by modules, as a heat map.

    Equal sizes make equal files, whatever the styles that matplotlib is set to; pyplot is not involved.

    Args:
        sizes: Sizes of child networks by name of the parameter; at least one.
        path: The PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `sizes` is empty.
    """
    if not sizes:
        raise ValueError("sizes must hold at least one parameter with a child network, got none.")
    groups = grouped(sizes, lambda place: (place.layer, place.kind))
    percents = {place: 100 * total_size(group).density for place, group in groups.items()}
    layers, kinds = (list(dict.fromkeys(axis)) for axis in zip(*percents, strict=True))
    rows = tuple("none" if layer is None else str(layer) for layer in layers)
    matrix = tuple(tuple(percents.get((layer, kind), math.nan) for kind in kinds) for layer in layers)
    title = "Child network:\nchosen entries of each module (%)"
    _write(path, _HeatMap(rows, tuple(kinds), matrix, title, "chosen entries (%)", "layer"))


def draw_overlap(names: Sequence[str], matrix: Sequence[Sequence[float]], path: str | Path) -> None:
    """Draw how much the child networks of several adapters overlap, adapters by adapters, as a heat map.

    Args:
        names: Names of the adapters, at least one.
        matrix: Jaccard indices from 0 to 1, a row and a column for each adapter.
        path: The PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    labels, values = tuple(names), tuple(map(tuple, matrix))
    _write(path, _HeatMap(labels, labels, values, "Overlap of child networks", "Jaccard index", ""))


class _HeatMap(NamedTuple):
    """What a heat map shows, hashable for the cache of `_drawn`; NaN is a cell without a number."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    title: str
    unit: str
    ylabel: str


def _write(path: str | Path, heat_map: _HeatMap) -> None:
    import matplotlib.style

    # Do not read `$` in names as formulas, nor warn about characters that the font lacks.
    with matplotlib.style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ", category=UserWarning)
        Path(path).write_bytes(_drawn(heat_map))


@lru_cache(maxsize=8)  # every checkpoint of a run has the same picture
def _drawn(heat_map: _HeatMap) -> bytes:
    """A heat map as PNG."""
    from matplotlib.figure import Figure

    rows, columns = (
        [label if len(label) <= MAX_LABEL else f"...{label[-MAX_LABEL:]}" for label in labels]
        for labels in (heat_map.rows, heat_map.columns)
    )
    width, height = CELL[0] * len(columns), CELL[1] * len(rows)
    margin = 0.05 * max(map(len, (*rows, *columns)))
    figure = Figure((min(width, LONGEST) + margin + 3, min(height, LONGEST) + margin + 1.5), layout="constrained")
    axes = figure.add_subplot(title=heat_map.title, ylabel=heat_map.ylabel)
    axes.set_facecolor("0.85")  # cells without a number
    highest = max(value for values in heat_map.matrix for value in values if not math.isnan(value))
    image = axes.imshow(heat_map.matrix, cmap="cividis", vmin=0, vmax=highest, aspect="auto")
    figure.colorbar(image, label=heat_map.unit)

    row_step, column_step = (math.ceil(len(labels) / MAX_LABELS) for labels in (rows, columns))
    axes.set_xticks(
        range(0, len(columns), column_step), columns[::column_step], rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(0, len(rows), row_step), rows[::row_step])
    if max(width, height) <= LONGEST:
        for row, values in enumerate(heat_map.matrix):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    color = "black" if 2 * value > highest else "white"
                    axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, size=8)
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})  # else it names the version of matplotlib
    return png.getvalue()
