"""Merging the child networks of a layer into its base parameters, and taking them out again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from peft_child.layers.loading import LoadingLayer
from peft_child.layers.packed import Requantised, tensors_of
from peft_child.tensors.compose import Child, Composition, positions_of
from peft_child.tensors.distributed import check_has_values, is_sharded
from peft_child.tensors.partitioned import check_gathered, is_partitioned
from peft_child.tensors.quantised import PackedWeight, is_quantised


class _Replaced(NamedTuple):
    """Base values that a merge overwrote."""

    parameter: str
    indices: Tensor | None
    values: Tensor


class MergingLayer(LoadingLayer):
    """The child networks of a base layer, which can be merged into it.

    Args:
        base_layer: The module, of any kind; it keeps its parameters, hooks and attributes.
        quantization_backend: PEFT's backend to quantise its weight again, if it is quantised and can be.
    """

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer)
        self.quantization_backend = quantization_backend
        self.merged_adapters: list[str] = []
        self._replaced: list[_Replaced] = []
        # The base layer, while a requantised copy stands in its place; in a list, to be no submodule.
        self._quantised: list[nn.Module] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the composed values into the base parameters, and keep the values that they replace.

        A quantised weight is unpacked, added to, and quantised again; the base layer itself is kept, and a copy takes
        its place.

        Args:
            safe_merge: Check that the composed values are finite before anything is written.
            adapter_names: The adapters; by default the active ones.

        Raises:
            ValueError: If `safe_merge` finds a NaN or infinite value, or a weight cannot be quantised again.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.child_delta]
        if not names:
            return
        self.check_mergeable(names, safe_merge)
        merged = [*self.merged_adapters, *names]
        self._restore()  # so that all merged adapters are summed first, and the sum is rounded once
        self._write(merged)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Restore the base values, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []

    @torch.no_grad()
    def check_mergeable(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, before it writes anything."""
        for adapter in adapter_names:
            self.check_is_chosen(adapter, "merging")
        for parameter, base, children in self._held(adapter_names):
            if is_quantised(base) and self.quantization_backend is None:
                name, kind = self.name_of(parameter), type(self.base_layer).__name__
                if isinstance(base, PackedWeight) and kind == "Linear":
                    why = "offloaded: load the base model without offloading to merge"
                else:
                    holder = kind if isinstance(base, PackedWeight) else type(base).__name__
                    why = f"quantised ({holder}), and PEFT cannot quantise it again: merge into the dense base model"
                raise ValueError(
                    f"'{name}' is {why}, or on the command line (`peft-child merge ADAPTER BASE OUTPUT`)."
                )
            if safe_merge and not torch.isfinite(Composition(base.detach(), children).tensor()).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: "
                    f"'{parameter}' of a {type(self.base_layer).__name__} would have NaN or infinite values. Nothing "
                    "was merged."
                )

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; a merged layer is unmerged when it is disabled."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _held(self, adapter_names: list[str]) -> Iterator[tuple[str, nn.Parameter, tuple[Child, ...]]]:
        """Parameters whose children this layer holds. Merging writes a tied one in the layer that holds its child."""
        for parameter in self.targeted():
            children = () if parameter in self.child_ties else tuple(self.children_of(parameter, adapter_names))
            if children:
                base = self.base_parameter(parameter)
                self._check_present(parameter, base)
                yield parameter, base, children

    @torch.no_grad()
    def _write(self, adapter_names: list[str]) -> None:
        held = list(self._held(adapter_names))
        for _, base, children in held:
            if is_quantised(base):
                self._requantise(Composition(base.detach(), children))
        for parameter, base, children in self._held(adapter_names):
            if is_quantised(base):
                continue
            indices = _union(children)
            before = _values_at(base, indices)
            if len(children) == 1:  # its entries alone, as if they were all that the tensor has
                after = Composition(before, (children[0]._replace(indices=None),)).tensor()
            else:
                after = _values_at(Composition(base.detach(), children).tensor(), indices)
            self._replaced.append(_Replaced(parameter, indices, before))
            _set_values_at(base, indices, after)

    def _requantise(self, weight: Composition) -> None:
        """Put a copy of the base layer in its place, whose weight is composed and quantised again."""
        warnings.warn(
            f"Merging into the quantised weight of a {type(self.base_layer).__name__} may change what the model "
            "generates, since the sum is rounded again.",
            stacklevel=2,
        )
        assert self.quantization_backend is not None
        if isinstance(weight.base, PackedWeight):
            weight = weight._replace(base=weight.base.unpacked())  # not rounded to the dtype that it computes in
        before = self.base_layer
        self.base_layer = Requantised(before, self.quantization_backend, weight.tensor()).base_layer
        self._quantised = [before]

    @torch.no_grad()
    def _restore(self) -> None:
        if self._quantised:
            device = next(tensors_of(self.base_layer)).device  # it was left behind if the model has moved
            (self.base_layer,), self._quantised = self._quantised, []
            self.base_layer.to(device)
            self._replaced = []  # what was written since was written to the copy
        for parameter, indices, values in self._replaced:
            base = self.base_parameter(parameter)
            places = None if indices is None else indices.to(base.device)
            _set_values_at(base, places, values.to(base.device, base.dtype))
        self._replaced = []

    def _check_present(self, parameter: str, base: Tensor) -> None:
        check_has_values(f"Parameter '{parameter}' of a {type(self.base_layer).__name__}", base)
        if is_partitioned(base):
            name = self.name_of(parameter)
            check_gathered(f"Parameter '{name}'", base)
            for adapter, delta in self.deltas_of(parameter):
                check_gathered(f"The child network of '{name}' (adapter '{adapter}')", delta)
        if is_sharded(base):
            raise RuntimeError(
                f"Parameter '{parameter}' of a {type(self.base_layer).__name__} is sharded (a DTensor), so that it "
                "cannot be composed or merged: apply fully_shard to modules around the Child-Tuning layer, not to the "
                "module inside it; to merge, save the adapter and load it in one process."
            )


def _union(children: tuple[Child, ...]) -> Tensor | None:
    """Positions of all children, possibly with repeats; None, for all entries, if a child covers the whole tensor."""
    indices = [positions_of(child.indices) for child in children if child.indices is not None]
    return torch.cat(indices) if len(indices) == len(children) else None


def _values_at(base: Tensor, indices: Tensor | None) -> Tensor:
    flat = base.detach().reshape(-1)
    return flat.clone() if indices is None else flat[indices]


def _set_values_at(base: Tensor, indices: Tensor | None, values: Tensor) -> None:
    if indices is None:
        base.detach().copy_(values.view(base.shape))
    elif base.is_contiguous():
        base.detach().view(-1).index_copy_(0, indices, values)
    else:
        base.detach().copy_(base.detach().reshape(-1).index_copy(0, indices, values).view(base.shape))
