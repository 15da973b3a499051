"""What training has changed since an inference engine was last told, for reinforcement learning and live serving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_child.files.adapter_tensors import checksum_of
from peft_child.files.patch import TensorPatch, index_dtype
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.delta import rounded_sum
from peft_child.tensors.distributed import check_whole
from peft_child.tensors.quantised import is_quantised


class PatchStream:
    """The changes of an adapter, step by step, as sparse updates of the weights of an engine that began with the base.

    An update of half precision weights is smaller than the child network: a change too small to move the rounded
    value is kept back until it does. What has been sent is remembered, in the dtype of the engine and on the device
    of the base.

    Args:
        model: A model with a Child-Tuning adapter, not merged, whose base weights the engine holds.
        adapter_name: The adapter.
        dtype: Dtype of the engine's weights; by default that of the base model.

    Raises:
        ValueError: If there is no such adapter, or a base weight is quantised or sharded.
    """

    def __init__(self, model: nn.Module, *, adapter_name: str = "default", dtype: torch.dtype | None = None) -> None:
        self.layers = list(child_tuning_layers(model, adapter_name).values())
        if not self.layers:
            raise ValueError(f"The model has no Child-Tuning adapter '{adapter_name}'.")
        self.adapter_name, self.dtype = adapter_name, dtype
        self.sent: dict[str, tuple[Tensor, Tensor]] = {}  # positions, and the values that the engine has there

    def changes(self) -> dict[str, TensorPatch]:
        """What has changed since the last call; at the first call, since the base.

        Returns:
            By name of the parameter in the base model: its shape, the flat positions of the entries that changed
            (int32 where that suffices), their new values, and a checksum of the values that they replace. Tensors
            without a change are left out.

        Raises:
            ValueError: If the adapter is merged, or its child network is not the one of the last call.
        """
        found = {}
        for layer in self.layers:
            layer.check_is_chosen(self.adapter_name, "sending its changes")
            if layer.merged:
                raise ValueError("The changes of a merged adapter are not known: unmerge it before they are sent.")
            bases = layer.base_parameters(self.adapter_name)
            for name, child in layer.sparse_deltas(self.adapter_name).items():
                base = bases[name]
                check_whole(name, base, "send its changes from one process")
                if is_quantised(base):
                    raise ValueError(f"'{name}' is quantised: an engine cannot take changes of its packed weights.")
                found[name] = self._change(name, base.detach(), child.indices, child.values.detach())
        return {name: patch for name, patch in found.items() if len(patch.indices)}

    def _change(self, name: str, base: Tensor, indices: Tensor, delta: Tensor) -> TensorPatch:
        values = base.reshape(-1).index_select(0, indices.to(base.device))
        merged = rounded_sum(values, delta.to(values.device)).to(self.dtype or base.dtype)
        chosen = indices.to(values.device, index_dtype(base.numel()))
        before, had = self.sent.get(name, (chosen, values.to(merged.dtype)))
        if not torch.equal(before, chosen):
            raise ValueError(f"'{name}' has another child network than at the last call: make a new PatchStream.")
        self.sent[name] = chosen, merged
        moved = merged != had
        return TensorPatch(tuple(base.shape), chosen[moved], merged[moved], checksum_of(had[moved]))
