"""The child networks of a layer as loaders see them: what an adapter's file or a whole state dict brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_child.files.adapter_tensors import INDEX, KINDS, MASK, check_numel, checked_child, precise_dtype
from peft_child.layers.state import Draw, LayerState, block_of
from peft_child.tensors.channels import Channels
from peft_child.tensors.codec import FormatError
from peft_child.tensors.delta import ChildSize
from peft_child.tensors.distributed import is_sharded
from peft_child.tensors.partitioned import gathered_whole, is_optimized


class LoadingLayer(LayerState):
    """The child networks of a base layer, which files and state dicts can bring.

    A random child network for which there is room is drawn only if nothing has filled it when it is first used.
    """

    def mark_unloaded(self, adapter_name: str, draw: Draw | None = None) -> None:
        """Record that the adapter was added for a file, until one is loaded; `draw` as in `AdapterState`."""
        state = self.child_states[adapter_name]
        state.unloaded, state.draw = True, draw

    def draw_unloaded(self, adapter_name: str) -> bool:
        """Draw a random child network for which there is room, if no file has filled it.

        Returns:
            Whether something was drawn.
        """
        state, blocks = self.child_states[adapter_name], self.child_index.of(adapter_name)
        if state.draw is None or not state.unloaded or any(block.is_meta for block in blocks.values()):
            return False
        layouts = self.layouts(adapter_name)
        empty = [(key, name, delta) for key, name, delta in self._named_deltas(adapter_name) if not blocks[key].any()]
        for parameter, name, delta in empty:
            base = self.base_parameter(parameter)
            # A block drawn as an inference tensor could not be loaded into.
            with gathered_whole([base]), torch.inference_mode(False):
                blocks[parameter] = block_of(base, state.draw(name, base, layouts[name], delta.numel()))
        state.unloaded = False
        return bool(empty)

    def is_unloaded(self, adapter_name: str) -> bool:
        """Whether the adapter was added for a file that has not been loaded."""
        return adapter_name in self.child_states and self.child_states[adapter_name].unloaded

    def _indices(self, adapter_name: str, parameter: str) -> Tensor | Channels:
        """As in the base class; what no file has filled is drawn first."""
        try:
            return super()._indices(adapter_name, parameter)
        except FormatError:
            if not self.draw_unloaded(adapter_name):
                raise
            return super()._indices(adapter_name, parameter)

    def sizes_in(
        self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str
    ) -> tuple[dict[str, ChildSize], dict[str, torch.dtype]]:
        """Sizes and dtypes of the child networks that a model's state dict has for this layer, by name.

        Args:
            state_dict: Tensors by their names in the model.
            prefix: Name of this layer there, with a dot at the end.
            adapter_name: An adapter of this layer.

        Raises:
            FormatError: If a child network is damaged, or belongs to a tensor of another size.
        """
        sizes, dtypes = {}, {}
        for parameter, name in self.targets_of(adapter_name).items():
            keys = {kind: f"{prefix}{kind}.{adapter_name}.{parameter}" for kind in (*KINDS, MASK)}
            tensors = {kind: state_dict[key] for kind, key in keys.items() if key in state_dict}
            if tensors:
                child = checked_child(name, tensors)
                check_numel(name, child, self.base_parameter(parameter))
                sizes[name], dtypes[name] = child.size(), precise_dtype(child.delta)
        return sizes, dtypes

    def is_optimized(self) -> bool:
        """Whether an engine of DeepSpeed trains deltas of this layer."""
        return any(map(is_optimized, self.child_delta.parameters()))

    def check_same_child(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise a `RuntimeError` if a checkpoint of DeepSpeed has other child networks than this layer.

        DeepSpeed restores deltas from its optimizer, and nothing can be added to that any more.
        """
        for adapter, state in self.child_states.items():
            for parameter, name in state.targets.items():
                blocks = self.child_index.of(adapter)
                here = dict(blocks.items()).get(parameter)
                there = state_dict.get(f"{prefix}{INDEX}.{adapter}.{parameter}")
                if here is not there and (here is None or there is None or not here.cpu().equal(there.cpu())):
                    raise RuntimeError(
                        f"The checkpoint has another child network of '{name}' (adapter '{adapter}') than the model, "
                        "which DeepSpeed trains already: make the model with PeftModel.from_pretrained(base_model, "
                        "CHECKPOINT, is_trainable=True), or choose the same child network again, before resuming."
                    )

    def make_room(self, adapter_name: str, sizes: Mapping[str, ChildSize], dtypes: Mapping[str, torch.dtype]) -> None:
        """Allocate for a state dict about to be loaded, unless the sizes are right already.

        New deltas take gradients if the adapter is active. Sharded deltas (FSDP2) are never allocated again: if sizes
        differ, torch's `load_state_dict` says so.
        """
        if any(map(is_sharded, self._deltas(adapter_name).values())):
            return
        if not self.is_chosen(adapter_name) or self.sizes(adapter_name) != sizes:
            self.allocate(adapter_name, sizes, dtypes, trainable=True)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As torch's; a child network that was chosen in another model gets room first."""
        if not self.is_optimized():
            found = {adapter: self.sizes_in(state_dict, prefix, adapter) for adapter in self.child_states}
            for adapter, (sizes, dtypes) in found.items():
                if sizes:
                    self.make_room(adapter, sizes, dtypes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As torch's; what no file has filled is drawn first."""
        for adapter in self.child_states:
            self.draw_unloaded(adapter)
        super()._save_to_state_dict(*args, **kwargs)
