"""What an adapter holds, in numbers: by tensor, by layer, by kind of module, and in total."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from peft_child.card.plot import grouped
from peft_child.files.adapter_folder import SparseAdapter
from peft_child.tensors.delta import ChildSize, total_size


@dataclass(frozen=True)
class Counted:
    """The child networks of one or more tensors; fields are named as in the output of `inspect --json`.

    Attributes:
        tensors: Number of tensors.
        numel: Their entries.
        chosen: Their entries in the child network.
        density: Share of the entries that are chosen.
        index_bytes: Bytes of the index blocks on disk.
        delta_bytes: Bytes of the deltas on disk.
        norm: L2 norm of the deltas.
        dtype: Dtypes of the deltas on disk.
    """

    tensors: int
    numel: int
    chosen: int
    density: float
    index_bytes: int
    delta_bytes: int
    norm: float
    dtype: str


@dataclass(frozen=True)
class Summary:
    """An adapter in numbers; fields are named as in the output of `inspect --json`.

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


def summarize(adapter: SparseAdapter) -> Summary:
    """Count what an adapter that was read from a folder holds; every delta is read once."""
    tensors = {name: _count(adapter, name) for name in adapter.deltas}
    layers = grouped(tensors, lambda place: "none" if place.layer is None else str(place.layer))
    modules = grouped(tensors, lambda place: place.kind)
    return Summary(
        total=_total(tensors.values()),
        tensors=tensors,
        layers={layer: _total(parts) for layer, parts in layers.items()},
        modules={kind: _total(modules[kind]) for kind in sorted(modules)},
        saved_whole={
            name: {"shape": list(tensor.shape), "dtype": _short(tensor.dtype), "bytes": tensor.nbytes}
            for name, tensor in adapter.dense.items()
        },
    )


def _count(adapter: SparseAdapter, name: str) -> Counted:
    size, values = adapter.sizes[name], adapter.deltas[name].values
    norm = float(values.double().norm())
    return Counted(
        1, size.numel, size.chosen, size.density, size.index_bytes, values.nbytes, norm, _short(values.dtype)
    )


def _total(parts: Collection[Counted]) -> Counted:
    size = total_size(ChildSize(part.numel, part.chosen, part.index_bytes) for part in parts)
    return Counted(
        tensors=len(parts),
        numel=size.numel,
        chosen=size.chosen,
        density=size.density,
        index_bytes=size.index_bytes,
        delta_bytes=sum(part.delta_bytes for part in parts),
        norm=math.hypot(*(part.norm for part in parts)),
        dtype=", ".join(sorted({part.dtype for part in parts})),
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
