"""The child networks of one targeted module: their tensors, and a record for each adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_child.files.adapter_tensors import (
    fingerprint_of,
)
from peft_child.layers.buffers import IndexBuffers, MaskBuffers
from peft_child.layers.granularity import layout_of
from peft_child.layers.packed import keep_packing, packed_weight, tensors_of
from peft_child.layers.unheld import expect_optimizer
from peft_child.tensors.channels import ChannelLayout, Channels
from peft_child.tensors.codec import FormatError, decode_channels, encode
from peft_child.tensors.compose import Child, lock_of, positions_of
from peft_child.tensors.delta import ChildSize, SparseDelta
from peft_child.tensors.distributed import check_whole, is_sharded
from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.mask_steps import MaskUse, count_steps, numbered, owner_of
from peft_child.tensors.partitioned import (
    check_gathered,
    check_not_optimized,
    gathered_whole,
    numel_of,
    shape_of,
)
from peft_child.tensors.quantised import PackedWeight


Draw = Callable[[str, Tensor, ChannelLayout, int], SparseDelta]


@dataclass
class AdapterState:
    """What a layer records of an adapter besides its tensors.

    Attributes:
        targets: The targeted parameters of the base layer, with their names in the whole model.
        mask: The mask that the gradients of new deltas start with, or None.
        chosen: Whether the child network has been chosen or loaded.
        unloaded: Whether the adapter was added for a file that has not been loaded.
        draw: If the child network is random, draws that of a parameter in case no file comes, from the parameter's
            name, the parameter, its layout and the number of entries.
        unsharded: Whether the deltas were made when the base layer was sharded already (FSDP2), and are whole.
    """

    targets: dict[str, str]
    mask: GradientMask | None
    chosen: bool
    unloaded: bool = False
    draw: Draw | None = None
    unsharded: bool = False


class LayerState(nn.Module, BaseTunerLayer):
    """The child networks of the adapters of one base layer, as ordinary tensors that every loader can read.

    Args:
        base_layer: The module, of any kind; it keeps its parameters, hooks and attributes.

    Attributes:
        child_delta: By adapter and parameter, the trained change of the chosen entries, float32, shape `(k,)`.
        child_index: By adapter and parameter, the encoded flat indices of these entries, uint8.
        child_mask: By adapter and parameter, the packed mask of the delta's gradient, int64, if it is masked.
        child_states: By adapter, its `AdapterState`.
        child_ties: By parameter whose tensor also belongs to an earlier layer: that layer, which holds the delta, and
            the parameter's name there.
    """

    # PEFT looks for adapters in the attributes of these names: trainable parameters, then everything else.
    adapter_layer_names = ("child_delta",)
    other_param_names = ("child_index", "child_mask", "child_states")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        keep_packing(base_layer)
        self._can_be_packed = packed_weight(base_layer) is not None
        self.child_delta = nn.ModuleDict()
        self.child_index = IndexBuffers()
        self.child_mask = MaskBuffers()
        self.child_states: dict[str, AdapterState] = {}
        self.child_ties: dict[str, tuple[LayerState, str]] = {}
        self._number = numbered(self)

    def add_adapter(
        self,
        adapter_name: str,
        targets: Mapping[str, str],
        ties: Mapping[str, tuple[LayerState, str]],
        mask: GradientMask | None = None,
    ) -> None:
        """Make room for an adapter whose child network is chosen or loaded later.

        Args:
            adapter_name: The new adapter.
            targets: Targeted parameters of the base layer and their names in the whole model.
            ties: Parameters that are tied to those of an earlier layer, with that layer and their names in it.
            mask: Gradient mask that the deltas start with; by default their gradients are not masked.
        """
        self.child_delta[adapter_name] = nn.ParameterDict()
        self.child_index.add_adapter(adapter_name)
        self.child_mask.add_adapter(adapter_name)
        # With ties alone there is nothing to choose here: the earlier layers hold the child networks.
        self.child_states[adapter_name] = AdapterState(dict(targets), mask, chosen=not targets)
        self.child_ties.update(ties)
        if mask is not None:
            count_steps(self._number)

    # Reading

    @property
    def adapters(self) -> list[str]:
        """The adapters that this layer has."""
        return list(self.child_states)

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter targets this layer, or one of its parameters through a tie."""
        return adapter_name in self.child_states

    def targets_of(self, adapter_name: str) -> dict[str, str]:
        """The parameters of the base layer that an adapter targets, with their names in the whole model."""
        return self.child_states[adapter_name].targets if adapter_name in self.child_states else {}

    def targeted(self) -> list[str]:
        """The parameters of the base layer that any adapter targets, here or through a tie."""
        targets = [key for state in self.child_states.values() for key in state.targets]
        return list(dict.fromkeys([*targets, *self.child_ties]))

    def is_chosen(self, adapter_name: str) -> bool:
        """Whether the child network is chosen, loaded, or allocated for a file; also true without the adapter."""
        return adapter_name not in self.child_states or self.child_states[adapter_name].chosen

    def check_is_chosen(self, adapter_name: str, what: str) -> None:
        """Raise a `RuntimeError` if `what` would be done to an adapter without a child network."""
        if not self.is_chosen(adapter_name):
            raise RuntimeError(
                f"The child network of adapter '{adapter_name}' has not been chosen: call "
                f"select_child_network(model, dataloader, adapter_name='{adapter_name}') before {what}."
            )

    def base_parameter(self, name: str) -> nn.Parameter:
        """The parameter of the base layer, never composed; a packed one as a `PackedWeight`."""
        with lock_of(self.base_layer):
            return self._base(name)

    def _packed(self) -> PackedWeight | None:
        """The weight of the base layer if it is packed or offloaded now; the base layer may be moved or replaced."""
        return packed_weight(self.base_layer) if self._can_be_packed else None

    def _base(self, name: str) -> nn.Parameter:
        packed = self._packed() if name == "weight" else None
        if packed is not None:
            return cast(nn.Parameter, packed)
        parameters = self.base_layer._parameters
        parameter = parameters[name] if name in parameters else None  # noqa: SIM401 (DeepSpeed gathers at [...])
        if parameter is None:
            raise RuntimeError(
                f"'{name}' has a child network, but is no parameter of the {type(self.base_layer).__name__} any more: "
                "it was quantised, parametrised or replaced. Call merge_and_unload() before such changes."
            )
        return parameter

    def base_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters that an adapter targets in this layer, never composed, by name in the whole model."""
        return {name: self.base_parameter(key) for key, name in self.targets_of(adapter_name).items()}

    def layouts(self, adapter_name: str) -> dict[str, ChannelLayout]:
        """How input channels lie in the parameters that an adapter targets here, by name in the whole model."""
        bases = {key: self.base_parameter(key) for key in self.targets_of(adapter_name)}
        return {
            self.targets_of(adapter_name)[key]: layout_of(self.base_layer, key, base) for key, base in bases.items()
        }

    def sizes(self, adapter_name: str) -> dict[str, ChildSize]:
        """Sizes of the adapter's child networks in this layer, by name in the whole model."""
        blocks = self.child_index.of(adapter_name)
        return {
            name: ChildSize(numel_of(self.base_parameter(key)), numel_of(delta), blocks[key].numel())
            for key, name, delta in self._named_deltas(adapter_name)
        }

    def sparse_deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The adapter's child networks in this layer, by name in the whole model."""
        for _, name, delta in self._named_deltas(adapter_name):
            check_gathered(f"The child network of '{name}' (adapter '{adapter_name}')", delta)
        return {
            name: SparseDelta(
                tuple(shape_of(self.base_parameter(key))),
                self.indices(adapter_name, key),
                delta,
                layout=self._layout(adapter_name, key),
            )
            for key, name, delta in self._named_deltas(adapter_name)
        }

    def parameters_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters that hold the adapter's deltas in this layer, by name in the whole model."""
        return {name: delta for _, name, delta in self._named_deltas(adapter_name)}

    def named_deltas(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's deltas in this layer, detached, shape `(k,)`, by name in the whole model."""
        return {name: delta.detach() for _, name, delta in self._named_deltas(adapter_name)}

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the child network of an adapter has moved from the base here."""
        return any(bool(delta.any()) for delta in self._deltas(adapter_name).values())

    def _deltas(self, adapter_name: str) -> nn.ParameterDict:
        """The adapter's deltas by parameter; empty if it has none here."""
        return cast(nn.ParameterDict, self.child_delta._modules.get(adapter_name, {}))

    def _named_deltas(self, adapter_name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Parameter, its name in the whole model, and its delta."""
        deltas = self._deltas(adapter_name)
        return ((key, name, deltas[key]) for key, name in self.targets_of(adapter_name).items() if key in deltas)

    def indices(self, adapter_name: str, parameter: str) -> Tensor:
        """Flat indices of the child in a parameter, int64, shape `(k,)`, on the device of the delta."""
        return positions_of(self._indices(adapter_name, parameter))

    def _layout(self, adapter_name: str, parameter: str) -> ChannelLayout | None:
        """How input channels lie in a parameter, if the child network consists of whole ones."""
        block = self.child_index.of(adapter_name)[parameter]
        channels = None if block.is_meta else decode_channels(block.cpu().numpy().data)
        return None if channels is None else channels[0]

    def _indices(self, adapter_name: str, parameter: str) -> Tensor | Channels:
        """As `indices`, int32 where that suffices, or as channels."""
        if torch.compiler.is_dynamo_compiling():  # it can neither decode nor see whether a buffer has changed
            _decode_now(self._number)
            return self.child_index.known(adapter_name, parameter)
        try:
            return self.child_index.present(adapter_name, parameter)
        except FormatError as error:
            name = self.targets_of(adapter_name)[parameter]
            raise FormatError(f"The child of '{name}' (adapter '{adapter_name}'). {error}") from error

    def name_of(self, parameter: str) -> str:
        """The name of a targeted parameter of the base layer in the whole model."""
        holder, held = self.child_ties.get(parameter, (self, parameter))
        return next(state.targets[held] for state in holder.child_states.values() if held in state.targets)

    def deltas_of(self, parameter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Adapters and their deltas in one parameter of the base layer, those of tied parameters included."""
        holder, held = self.child_ties.get(parameter, (self, parameter))
        for adapter in holder.child_delta:
            if held in holder._deltas(adapter):
                yield adapter, holder._deltas(adapter)[held]

    def children_of(self, parameter: str, adapter_names: Collection[str]) -> Iterator[Child]:
        """The children of some adapters in one parameter of the base layer, those of tied parameters included."""
        holder, held = self.child_ties.get(parameter, (self, parameter))
        for adapter in holder.child_delta:  # always in the order they were added: the order changes a sum's rounding
            if adapter in adapter_names and held in holder._deltas(adapter):
                yield holder._child(adapter, held)

    def _child(self, adapter_name: str, parameter: str) -> Child:
        delta = self._deltas(adapter_name)[parameter]
        is_whole = numel_of(delta) == numel_of(self._base(parameter))
        indices = None if is_whole else self._indices(adapter_name, parameter)
        is_masked = parameter in self.child_mask.of(adapter_name)
        return Child(delta, indices, MaskUse(self._number, f"{adapter_name}.{parameter}") if is_masked else None)

    # Choosing and loading

    def set_child(self, adapter_name: str, children: Mapping[str, SparseDelta], trainable: bool) -> None:
        """Give an adapter its child network in this layer.

        Args:
            adapter_name: An adapter of this layer.
            children: By name in the whole model, also of other layers; targets without one, or with an empty one,
                stay as they are in the base.
            trainable: Whether the deltas take gradients.
        """
        before = self._clear(adapter_name)
        for parameter, name in self.targets_of(adapter_name).items():
            child = children.get(name)
            if child is None or not child.indices.numel():
                continue  # FSDP2 cannot shard an empty delta
            base = self.base_parameter(parameter)
            with gathered_whole([base]):
                block = block_of(base, child)
            delta = _kept(before.get(parameter), child.values.detach().to(base.device, copy=True))
            self._put(adapter_name, parameter, delta, block, trainable)
            self.child_index.remember(adapter_name, parameter, _index_of(child))

    def allocate(
        self,
        adapter_name: str,
        sizes: Mapping[str, ChildSize],
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        trainable: bool,
    ) -> None:
        """Make deltas and blocks of the given sizes, to be filled by a loader.

        A delta that already has the wanted size stays the same object, since an optimizer may hold it.

        Args:
            adapter_name: An adapter of this layer.
            sizes: By name in the whole model, also of other layers, for the parameters with a child network.
            dtypes: Dtypes of the deltas by name, float32 if not given.
            trainable: Whether new deltas take gradients if the adapter is active.
        """
        trainable = trainable and adapter_name in self.active_adapters and not self.disable_adapters
        own = {key: name for key, name in self.targets_of(adapter_name).items() if name in sizes}
        wanted = {name: (dtypes or {}).get(name, torch.float32) for name in own.values()}
        present = {name: delta.dtype for name, delta in self.named_deltas(adapter_name).items()}
        if present == wanted and self.sizes(adapter_name) == {name: sizes[name] for name in wanted}:
            self._mark_chosen(adapter_name)
            return
        before = self._clear(adapter_name)
        for parameter, name in own.items():
            device = self.base_parameter(parameter).device
            block = torch.zeros(sizes[name].index_bytes, dtype=torch.uint8, device=device)
            values = torch.zeros(sizes[name].chosen, dtype=wanted[name], device=device)
            self._put(adapter_name, parameter, _kept(before.get(parameter), values), block, trainable)

    def keep(
        self, adapter_name: str, chosen: Mapping[str, Tensor], layouts: Mapping[str, ChannelLayout] | None = None
    ) -> None:
        """Keep a part of an adapter's child network here, and drop its gradient mask.

        Args:
            adapter_name: An adapter of this layer.
            chosen: Positions in its deltas of the values to keep, by name in the whole model, int64, strictly
                increasing.
            layouts: How input channels lie in the targets, by name, if whole ones are kept.
        """
        trainable = any(delta.requires_grad for delta in self._deltas(adapter_name).values())
        kept = {
            name: SparseDelta(
                delta.shape,
                delta.indices[chosen[name]],
                delta.values[chosen[name]],
                layout=(layouts or {}).get(name),
            )
            for name, delta in self.sparse_deltas(adapter_name).items()
        }
        self.child_states[adapter_name].mask = None
        self.set_child(adapter_name, kept, trainable)

    def _mark_chosen(self, adapter_name: str) -> None:
        self.clear_cache(adapter_name)
        state = self.child_states[adapter_name]
        state.chosen, state.unloaded = True, False

    def _clear(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Take an adapter's child network out, to be replaced; returns its deltas by parameter."""
        for _, name, delta in self._named_deltas(adapter_name):
            check_whole(name, delta, "give its adapter another child network before sharding the model")
            check_not_optimized(name, delta, "give its adapter another child network")
        deltas = dict(self._deltas(adapter_name).items())
        for held in (self._deltas(adapter_name), self.child_index.of(adapter_name), self.child_mask.of(adapter_name)):
            held.clear()
        self._mark_chosen(adapter_name)
        return deltas

    def _put(self, adapter_name: str, parameter: str, delta: nn.Parameter, block: Tensor, trainable: bool) -> None:
        state = self.child_states[adapter_name]
        self._deltas(adapter_name)[parameter] = delta.requires_grad_(trainable)
        expect_optimizer(delta, self.base_layer)
        self.child_index.of(adapter_name)[parameter] = block
        state.unsharded = is_sharded(self.base_parameter(parameter))
        if state.mask is not None:
            self.child_mask.of(adapter_name)[parameter] = state.mask.pack().to(block.device)

    # Gradient masks

    def masked(self, key: str, gradient: Tensor) -> Tensor:
        """The gradient of the delta `ADAPTER.PARAMETER` with its present mask."""
        adapter, parameter = key.split(".")
        mask = self.gradient_mask(adapter, parameter)
        channels = self._channels_of_delta(adapter, parameter) if mask.by_channel else None
        return mask.apply(self.targets_of(adapter)[parameter], gradient, channels)

    def _channels_of_delta(self, adapter_name: str, parameter: str) -> ChannelLayout | Tensor:
        """How the values of a delta are divided into input channels; see `GradientMask.apply`."""
        base = self.base_parameter(parameter)
        layout = layout_of(self.base_layer, parameter, base)
        if numel_of(self._deltas(adapter_name)[parameter]) == numel_of(base):
            return layout
        index = self._indices(adapter_name, parameter)
        if isinstance(index, Channels):
            return index.layout._replace(per_group=len(index.chosen))
        channels: Tensor = layout.channel_of(index.long()).unique(return_inverse=True)[1]
        return channels

    def gradient_mask(self, adapter_name: str, parameter: str) -> GradientMask:
        """The present mask of the gradient of a delta."""
        return self.child_mask.present(adapter_name, parameter)

    def counted_steps(self) -> list[int]:
        """Optimizer steps done, for every delta whose gradient is masked."""
        return [self.gradient_mask(*key).step for key in self._masked()]

    def count_step(self, stepped: Container[int] | None = None) -> None:
        """Go on to the masks of the next optimizer step.

        Args:
            stepped: Identities of the parameters that the optimizer has; by default all deltas were updated.
        """
        for adapter, parameter in self._masked():
            if stepped is None or id(self._deltas(adapter)[parameter]) in stepped:
                self.child_mask.count_step(adapter, parameter)

    def _masked(self) -> list[tuple[str, str]]:
        """Adapters and parameters of the deltas whose gradients are masked."""
        return [(adapter, parameter) for adapter in self.child_mask for parameter in self.child_mask.of(adapter)]

    # Deleting, casting, moving and copying

    def clear_cache(self, adapter_name: str | None = None) -> None:
        """Forget what was read from the buffers, as after writes that autograd does not count."""
        self.child_index.clear_cache(adapter_name)
        self.child_mask.clear_cache(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        self.clear_cache(adapter_name)

    def cast_deltas(self, adapter_name: str) -> None:
        """Give the deltas of an adapter the dtypes of their base parameters."""
        for parameter, delta in self._deltas(adapter_name).items():
            delta.data = delta.data.to(self.base_parameter(parameter).dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but deltas keep their precision whatever the dtype of the base."""
        if adapter_name in self.child_delta and not any(delta.is_meta for delta in self.child_delta.parameters()):
            if device is None:
                packed = self._packed()
                device = next(tensors_of(self.base_layer)).device if packed is None else packed.device
            for held in (self.child_delta, self.child_index, self.child_mask):
                held[adapter_name].to(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; a copy gets a number of its own, so that its gradient masks are its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = numbered(self)
        if self._masked():
            count_steps(self._number)


def block_of(base: Tensor, child: SparseDelta) -> Tensor:
    """The encoded positions of a child network, uint8, on the device of the base parameter."""
    fingerprint = fingerprint_of(base, child.indices)
    data = encode(child.indices.cpu().numpy(), tuple(base.shape), fingerprint, child.layout)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(base.device)


def _index_of(child: SparseDelta) -> Tensor | Channels:
    """The positions of a child network, as channels where they lie in one group."""
    if child.layout is None or child.layout.groups > 1:
        return child.indices
    return Channels(child.layout, child.layout.holding(child.indices))


def _kept(delta: nn.Parameter | None, values: Tensor) -> nn.Parameter:
    """The old delta, filled with the new values, if they fit it: an optimizer may hold it. Otherwise a new one."""
    described = (values.shape, values.dtype, values.device)
    if delta is None or (delta.shape, delta.dtype, delta.device) != described or delta.is_inference():
        return nn.Parameter(values)
    delta.grad = None
    with torch.no_grad():
        delta.copy_(values)
    return delta


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _decode_now(number: int) -> bool:
    """Decode all indices of a layer while the compiler traces it; it can pass a number, but not the layer."""
    layer = cast(LayerState, owner_of(number))
    for adapter in layer.child_index:
        for parameter in layer.child_index.of(adapter):
            layer._indices(adapter, parameter)
    return True
