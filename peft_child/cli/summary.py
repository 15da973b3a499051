"""What an adapter holds, in numbers: by tensor, by layer, by kind of module, and in total."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from peft_child.card.plot import places_of
from peft_child.files.adapter_folder import SparseAdapter


class Counted(NamedTuple):
    """The child networks of one or more tensors.

    Attributes:
        tensors: Number of tensors.
        numel: Their entries.
        chosen: Their entries in the child network.
        index_bytes: Bytes of the index blocks on disk.
        delta_bytes: Bytes of the deltas on disk.
        square: Sum of the squared deltas.
        dtypes: Dtypes of the deltas on disk.
    """

    tensors: int
    numel: int
    chosen: int
    index_bytes: int
    delta_bytes: int
    square: float
    dtypes: frozenset[str]

    @property
    def density(self) -> float:
        """Share of the entries that are chosen."""
        return self.chosen / max(1, self.numel)

    @property
    def norm(self) -> float:
        """L2 norm of the deltas."""
        return float(self.square**0.5)

    @property
    def dtype(self) -> str:
        """The dtypes as text."""
        return ", ".join(sorted(self.dtypes))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("tensors", "numel", "chosen", "density", "index_bytes", "delta_bytes", "norm", "dtype")
        return {name: getattr(self, name) for name in names}


class Summary(NamedTuple):
    """An adapter in numbers.

    Attributes:
        total: All of it.
        tensors: By name of the parameter in the base model.
        layers: By number of the layer, and `none` for what is outside of the layers.
        modules: By name of the module inside its layer.
        saved_whole: Shape, dtype and bytes of the tensors saved whole, by name in the file.
    """

    total: Counted
    tensors: dict[str, Counted]
    layers: dict[str, Counted]
    modules: dict[str, Counted]
    saved_whole: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        groups = {"tensors": self.tensors, "layers": self.layers, "modules": self.modules}
        return {
            "total": self.total.as_dict(),
            **{group: {name: part.as_dict() for name, part in parts.items()} for group, parts in groups.items()},
            "saved_whole": self.saved_whole,
        }


def summarize(adapter: SparseAdapter) -> Summary:
    """Count what an adapter that was read from a folder holds."""
    tensors = {name: _part(adapter, name) for name in adapter.deltas}
    places = places_of(tensors)
    order = sorted(tensors, key=lambda name: (places[name].layer is None, places[name].layer or 0))
    layers = _grouped(tensors, order, lambda name: "none" if places[name].layer is None else str(places[name].layer))
    modules = _grouped(tensors, sorted(tensors, key=lambda name: places[name].kind), lambda name: places[name].kind)
    saved_whole = {
        name: {"shape": list(tensor.shape), "dtype": _short(tensor.dtype), "bytes": tensor.nbytes}
        for name, tensor in adapter.dense.items()
    }
    return Summary(_added(tensors.values()), tensors, layers, modules, saved_whole)


def _part(adapter: SparseAdapter, name: str) -> Counted:
    delta = adapter.deltas[name]
    square = float(delta.values.double().square().sum())
    dtypes = frozenset([_short(delta.values.dtype)])
    numel, chosen, index_bytes = adapter.sizes[name]
    return Counted(1, numel, chosen, index_bytes, delta.values.nbytes, square, dtypes)


def _grouped(tensors: dict[str, Counted], order: list[str], group_of: Callable[[str], str]) -> dict[str, Counted]:
    groups: dict[str, list[Counted]] = {}
    for name in order:
        groups.setdefault(group_of(name), []).append(tensors[name])
    return {group: _added(parts) for group, parts in groups.items()}


def _added(parts: Iterable[Counted]) -> Counted:
    parts = list(parts)
    return Counted(
        tensors=sum(part.tensors for part in parts),
        numel=sum(part.numel for part in parts),
        chosen=sum(part.chosen for part in parts),
        index_bytes=sum(part.index_bytes for part in parts),
        delta_bytes=sum(part.delta_bytes for part in parts),
        square=sum(part.square for part in parts),
        dtypes=frozenset[str]().union(*(part.dtypes for part in parts)),
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
