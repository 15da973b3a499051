"""A checkpoint with other values at some entries, as a serving engine holds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_child.files.adapter_folder import SparseAdapter
from peft_child.files.adapter_tensors import PREFIX, checksum_of
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import check_fits, mismatch
from peft_child.files.patch import Patch, TensorPatch, tensor_patch


class PatchedCheckpoint:
    """A checkpoint with other values at some entries.

    Args:
        base: The checkpoint.

    Attributes:
        base: The checkpoint.
        changed: The entries that may have other values than the checkpoint's, and their values, by name of the tensor.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.changed: dict[str, TensorPatch] = {}

    def values_at(self, name: str, indices: Tensor) -> Tensor:
        """The values of a tensor at flat positions."""
        values = self.base[name].reshape(-1).index_select(0, indices)
        changed = self.changed.get(name)
        if changed is not None:
            places = torch.searchsorted(changed.indices, indices).clamp_(max=len(changed.indices) - 1)
            here = changed.indices[places] == indices
            values[here] = changed.values[places[here]]
        return values

    def with_adapter(self, adapter: SparseAdapter) -> dict[str, TensorPatch]:
        """The checkpoint with an adapter merged, as entries that differ from the checkpoint.

        Raises:
            NamesDifferError: If the checkpoint lacks a tensor of the adapter.
            ValueError: If a tensor has another size, or other values than those that the adapter was made on.
            FormatError: If the adapter is damaged.
        """
        check_fits(adapter, self.base)
        mismatched: list[str] = []
        names = [*adapter.deltas, *(key.removeprefix(PREFIX) for key in adapter.dense)]
        changed = {name: tensor_patch(adapter, self.base, name, mismatched) for name in names}
        if mismatched:
            raise ValueError(mismatch(self.base, mismatched[0]))
        return changed

    def with_patch(self, patch: Patch) -> dict[str, TensorPatch]:
        """This state after a patch, as entries that differ from the checkpoint.

        Raises:
            ValueError: If a tensor is missing or has another shape or dtype, or if the patch replaces other values.
            FormatError: If the patch is damaged.
        """
        changed = dict(self.changed)
        for name in patch.tensors:
            part = patch.tensors[name]
            self._check(name, part)
            changed[name] = overlaid(changed.get(name), part)
        return changed

    def _check(self, name: str, part: TensorPatch) -> None:
        place = self.base.places.get(name)
        if place is None:
            raise ValueError(f"The patch changes '{name}', which '{self.base.path}' does not have.")
        here, there = (place.shape, self.base[name].dtype), (part.shape, part.values.dtype)
        if here != there:
            raise ValueError(
                f"'{name}' has the shape {here[0]} and is {here[1]} in '{self.base.path}', but {there[0]} and "
                f"{there[1]} in the patch: export the patch for this checkpoint."
            )
        if part.before and part.before != checksum_of(self.values_at(name, part.indices)):
            raise ValueError(f"The patch was made to replace other values of '{name}' than those here.")

    def way_to(self, target: Mapping[str, TensorPatch]) -> dict[str, TensorPatch]:
        """What to write to get from here to another state: the base's values where only this state has others.

        Nothing is written for tensors that the two states have in common.
        """
        writes = {}
        for name in self.changed.keys() | target.keys():
            old, new = self.changed.get(name), target.get(name)
            if old is new:
                continue
            if old is not None:
                base = self.base[name].reshape(-1).index_select(0, old.indices)
                writes[name] = overlaid(old._replace(values=base), new)
            elif new is not None:
                writes[name] = new
        return writes


def overlaid(first: TensorPatch | None, second: TensorPatch | None) -> TensorPatch:
    """The entries of either of two patches of a tensor; where both have one, the second's value."""
    if first is None or second is None:
        only = first or second
        assert only is not None
        return only
    if torch.equal(first.indices, second.indices):
        return second._replace(before=0)
    kept = ~torch.isin(first.indices, second.indices, assume_unique=True)
    indices, order = torch.cat([first.indices[kept], second.indices]).sort()
    return TensorPatch(second.shape, indices, torch.cat([first.values[kept], second.values])[order])
