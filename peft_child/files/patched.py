"""A checkpoint with other values at some entries, as a serving engine holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.files.adapter_folder import SparseAdapter
from peft_child.files.adapter_tensors import PREFIX, checksum_of
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import check_fits, mismatch
from peft_child.files.patch import Patch, TensorPatch, reversed_patch, tensor_patch
from peft_child.tensors.delta import places_in


class Change(NamedTuple):
    """A way from one state of a checkpoint to another.

    Attributes:
        changed: The entries that then differ from the checkpoint, and their values, by name of the tensor.
        writes: What to write, by name of the tensor: one patch after the other.
    """

    changed: dict[str, TensorPatch]
    writes: dict[str, list[TensorPatch]]


class PatchedCheckpoint:
    """A checkpoint with other values at some entries.

    Args:
        base: The checkpoint.

    Attributes:
        base: The checkpoint.
        changed: The entries that may have other values than the checkpoint's, with both, by name of the tensor.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.changed: dict[str, TensorPatch] = {}

    def values_at(self, name: str, indices: Tensor, base: Tensor | None = None) -> Tensor:
        """The present values of a tensor at flat positions.

        Args:
            name: Name of the tensor.
            indices: The positions, shape `(k,)`.
            base: The checkpoint's values there, if they are at hand.
        """
        values = self.base[name].reshape(-1).index_select(0, indices) if base is None else base
        changed = self.changed.get(name)
        if changed is None:
            return values
        places, here = places_in(changed.indices, indices)
        return torch.where(here, changed.values[places], values)

    def names(self, source: SparseAdapter | Patch) -> list[str]:
        """The tensors that an adapter or a patch changes.

        Raises:
            NamesDifferError: If the checkpoint lacks a tensor of the adapter.
            ValueError: If it lacks one of the patch, or a tensor of the adapter has another size.
        """
        if isinstance(source, SparseAdapter):
            check_fits(source, self.base)
            return [*source.deltas, *(key.removeprefix(PREFIX) for key in source.dense)]
        for name in source.tensors:
            if name not in self.base.places:
                raise ValueError(f"The patch changes '{name}', which '{self.base.path}' does not have.")
        return list(source.tensors)

    def part(self, source: SparseAdapter | Patch, name: str, tensor: Tensor | None = None) -> TensorPatch:
        """What an adapter changes in one tensor of the checkpoint, or a patch in this state.

        Args:
            source: The adapter or the patch.
            name: One of its `names`.
            tensor: The checkpoint's tensor, if it is at hand.

        Raises:
            ValueError: If the tensor has another shape or dtype, or other values than those that the adapter was made
                on or that the patch replaces.
            FormatError: If the source is damaged.
        """
        tensor = self.base[name] if tensor is None else tensor
        if isinstance(source, Patch):
            return self._checked(name, source.tensors[name], tensor)
        mismatched: list[str] = []
        part = tensor_patch(source, name, tensor, mismatched)
        if mismatched:
            raise ValueError(mismatch(self.base, name))
        return part

    def to(self, source: SparseAdapter | Patch) -> Change:
        """The way to the checkpoint with an adapter merged, or to this state with a patch on top.

        Raises:
            NamesDifferError, ValueError, FormatError: If it does not fit, or is damaged; see `names` and `part`.
        """
        parts = {name: self.part(source, name) for name in self.names(source)}
        if isinstance(source, Patch):
            laid = {name: overlaid(self.changed.get(name), part) for name, part in parts.items()}
            return Change({**self.changed, **laid}, {name: [part] for name, part in parts.items()})
        writes = self.to_base().writes
        for name, part in parts.items():
            writes.setdefault(name, []).append(part)
        return Change(parts, writes)

    def to_base(self) -> Change:
        """The way back to the checkpoint."""
        return Change({}, {name: [reversed_patch(patch)] for name, patch in self.changed.items()})

    def _checked(self, name: str, part: TensorPatch, tensor: Tensor) -> TensorPatch:
        """A part of a patch with the checkpoint's values."""
        here, there = (tuple(tensor.shape), tensor.dtype), (part.shape, part.values.dtype)
        if here != there:
            raise ValueError(
                f"'{name}' has the shape {here[0]} and is {here[1]} in '{self.base.path}', but {there[0]} and "
                f"{there[1]} in the patch: export the patch for this checkpoint."
            )
        base = tensor.reshape(-1).index_select(0, part.indices)
        if part.before and part.before != checksum_of(self.values_at(name, part.indices, base)):
            raise ValueError(f"The patch was made to replace other values of '{name}' than those here.")
        return part._replace(replaced=base)

    def mark_torn(self, change: Change) -> None:
        """Note that a change was written in part: the way to anywhere then leads over all of its entries."""
        for name, patch in change.changed.items():
            self.changed[name] = overlaid(self.changed.get(name), patch)


def overlaid(first: TensorPatch | None, second: TensorPatch) -> TensorPatch:
    """The entries of either of two patches of a tensor, of which both have what they replace; the second's win."""
    if first is None:
        return second
    assert first.replaced is not None
    assert second.replaced is not None
    places, here = places_in(first.indices, second.indices)
    values = first.values.index_copy(0, places[here], second.values[here])
    if here.all():
        return first._replace(values=values)
    new = ~here
    indices, order = torch.cat([first.indices, second.indices[new]]).sort()
    values = torch.cat([values, second.values[new]])[order]
    return TensorPatch(second.shape, indices, values, 0, torch.cat([first.replaced, second.replaced[new]])[order])
