"""Where a child network lies: its entries by layer and kind of module, as numbers and as a heat map.

The names of parameters say both: `model.layers.3.mlp.up_proj.weight` is `mlp.up_proj` in layer 3. The first number in
a name counts the layers; numbers after it, such as those of experts, are taken together.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peft_child.tensors.delta import ChildSize


if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERED = re.compile(r"(?:(?P<stack>.+?)\.)?(?P<layer>[0-9]{1,6})\.(?P<kind>.+)", re.DOTALL)
NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
CELL = (0.75, 0.28)  # inches, enough for a percentage
LONGEST = 30  # inches; beyond it cells shrink, and are not annotated
MAX_LABELS = 100  # on one axis
MAX_LABEL = 50  # characters


class Place(NamedTuple):
    """Where a parameter is in a network.

    Attributes:
        layer: The number of its layer; None outside the layers, as for embeddings.
        kind: The module's name inside the layer, or its whole name outside the layers.
    """

    layer: int | None
    kind: str


class Share(NamedTuple):
    """How much of some tensors was chosen.

    Attributes:
        tensors: Number of tensors.
        numel: Their entries.
        chosen: Their entries in the child network.
    """

    tensors: int
    numel: int
    chosen: int

    @property
    def percent(self) -> float:
        """Chosen entries in percent of all entries of these tensors."""
        return 100 * self.chosen / self.numel


def shares_by_place(sizes: Mapping[str, ChildSize]) -> dict[Place, Share]:
    """Add up the sizes of child networks by place, in an order that does not depend on that of `sizes`.

    Args:
        sizes: Sizes of child networks by name of the parameter.

    Returns:
        Shares by place: by layer, what is outside the layers last, then by kind.
    """
    shares: dict[Place, Share] = {}
    for name, place in places_of(sizes).items():
        tensors, numel, chosen = shares.get(place, (0, 0, 0))
        shares[place] = Share(tensors + 1, numel + sizes[name].numel, chosen + sizes[name].chosen)
    return {place: shares[place] for place in sorted(shares, key=lambda place: (_rank(place.layer), place.kind))}


def shares_by_kind(sizes: Mapping[str, ChildSize]) -> dict[str, Share]:
    """As `shares_by_place`, added up over the layers, by kind."""
    places = shares_by_place(sizes)
    return {kind: total(share for place, share in places.items() if place.kind == kind) for kind in kinds_of(places)}


def kinds_of(places: Iterable[Place]) -> list[str]:
    """The kinds in some places, each once, in the order of the places."""
    return list(dict.fromkeys(place.kind for place in places))


def total(shares: Iterable[Share]) -> Share:
    """The sum of shares of different tensors."""
    return Share(*map(sum, zip(*shares, strict=True)))


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
    import matplotlib.style

    # Names are no formulas, and may have characters that the font lacks.
    with matplotlib.style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ", category=UserWarning)
        Path(path).write_bytes(_drawn(tuple(shares_by_place(sizes).items())))


@lru_cache(maxsize=8)
def _drawn(shares: tuple[tuple[Place, Share], ...]) -> bytes:
    """The figure as PNG; every checkpoint of a run has the same one."""
    png = BytesIO()
    _figure(dict(shares)).savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _figure(shares: Mapping[Place, Share]) -> Figure:
    from matplotlib.figure import Figure

    layers, kinds = list(dict.fromkeys(place.layer for place in shares)), kinds_of(shares)
    percents = [
        [shares[Place(layer, kind)].percent if Place(layer, kind) in shares else math.nan for kind in kinds]
        for layer in layers
    ]
    width, height = CELL[0] * len(kinds), CELL[1] * len(layers)
    labels = [kind if len(kind) <= MAX_LABEL else f"...{kind[-MAX_LABEL:]}" for kind in kinds]
    margin = 0.05 * max(map(len, labels))
    figure = Figure((min(width, LONGEST) + margin + 3, min(height, LONGEST) + margin + 1.5), layout="constrained")
    axes = figure.add_subplot(title="Child network", ylabel="layer")
    axes.set_facecolor("0.85")  # places without chosen entries
    image = axes.imshow(percents, cmap="cividis", vmin=0, aspect="auto")
    figure.colorbar(image, label="chosen entries (%)")

    rows, columns = (range(0, count, -(-count // MAX_LABELS)) for count in (len(layers), len(kinds)))
    axes.set_xticks(columns, [labels[i] for i in columns], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(rows, ["none" if layers[i] is None else str(layers[i]) for i in rows])
    if max(width, height) <= LONGEST:
        brightest = max(share.percent for share in shares.values())
        for (layer, kind), share in shares.items():
            color = "black" if 2 * share.percent > brightest else "white"
            at = kinds.index(kind), layers.index(layer)
            axes.text(*at, f"{share.percent:.3g}", ha="center", va="center", color=color, size=8)
    return figure


def _parts(name: str) -> tuple[str, int | None, str]:
    """Name of the list of layers, number of the layer if there is one, and name in the layer, of a parameter."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    found = LAYERED.fullmatch(module)
    if found is None:
        return "", None, module
    return found["stack"] or "", int(found["layer"]), NUMBER.sub("*", found["kind"])


def _rank(layer: int | None) -> float:
    return math.inf if layer is None else layer


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of every parameter, as `shares_by_place` has it, by name."""
    parts = {name: _parts(name) for name in names}
    stacks = {stack for stack, layer, _ in parts.values() if layer is not None}
    return {
        name: Place(layer, f"{stack}.*.{kind}" if layer is not None and len(stacks) > 1 else kind)
        for name, (stack, layer, kind) in parts.items()
    }


def draw_overlap(names: Sequence[str], matrix: Sequence[Sequence[float]], path: str | Path) -> None:
    """Draw how much the child networks of several adapters overlap, adapters by adapters, as a heat map.

    Args:
        names: Names of the adapters, at least one.
        matrix: Jaccard indices from 0 to 1, a row and a column for each adapter.
        path: The PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {"text.parse_math": False}]):  # names are no formulas
        margin = 1.5 + 0.07 * max(map(len, names))
        figure = Figure((CELL[0] * len(names) + margin + 2, CELL[0] * len(names) + margin), layout="constrained")
        axes = figure.add_subplot(title="Overlap of child networks")
        image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
        figure.colorbar(image, label="Jaccard index")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                color = "black" if value > 0.5 else "white"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, size=8)
        figure.savefig(path, format="png", metadata={"Software": None})
