"""What training has changed since an inference engine was last told, for reinforcement learning and live serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_child.files.adapter_tensors import checksum_of
from peft_child.files.patch import TensorPatch, index_dtype
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.delta import as_bits, rounded_sum
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
        ValueError: If there is no such adapter, or it has modules that are saved whole.
    """

    def __init__(self, model: nn.Module, *, adapter_name: str = "default", dtype: torch.dtype | None = None) -> None:
        self.layers = list(child_tuning_layers(model, adapter_name).values())
        if not self.layers:
            raise ValueError(f"The model has no Child-Tuning adapter '{adapter_name}'.")
        config = getattr(model, "peft_config", {}).get(adapter_name)
        whole = getattr(config, "modules_to_save", None)
        if whole:
            raise ValueError(f"Modules saved whole are not sent, and this adapter has some: {', '.join(whole)}.")
        self.adapter_name, self.dtype = adapter_name, dtype
        self.sent: dict[str, tuple[Tensor, Tensor]] = {}  # positions, and the values that the engine has there

    @contextmanager
    def changes(self) -> Iterator[dict[str, TensorPatch]]:
        """What has changed since the last time; the first time, since the base.

        If the `with` block ends with an error, nothing counts as sent, and the next changes contain these as well.

        Yields:
            By name of the parameter in the base model: its shape, the flat positions of the entries that changed
            (int32 where that suffices), their new values, and a checksum of the values that they replace. Tensors
            without a change are left out.

        Raises:
            ValueError: If the adapter is merged, or its child network is not the one of the last time.
        """
        sent, found = dict(self.sent), {}
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
                found[name] = self._change(name, base.detach(), child.indices, child.values.detach(), sent)
        yield {name: patch for name, patch in found.items() if len(patch.indices)}
        self.sent = sent

    def _change(
        self, name: str, base: Tensor, indices: Tensor, delta: Tensor, sent: dict[str, tuple[Tensor, Tensor]]
    ) -> TensorPatch:
        values = base.reshape(-1).index_select(0, indices.to(base.device))
        merged = rounded_sum(values, delta.to(values.device)).to(self.dtype or base.dtype)
        chosen = indices.to(values.device, index_dtype(base.numel()))
        before, had = sent.get(name, (chosen, values.to(merged.dtype)))
        if not torch.equal(before, chosen):
            raise ValueError(
                f"'{name}' has another child network than the last time. Take the old one out of the engine (swap to "
                "the base), and make a new PatchStream."
            )
        sent[name] = chosen, merged
        moved = as_bits(merged) != as_bits(had)  # -0.0 and 0.0 are different values in a file
        return TensorPatch(tuple(base.shape), chosen[moved], merged[moved], checksum_of(had[moved]))
