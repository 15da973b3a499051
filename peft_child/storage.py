"""What the adapters of one targeted module keep: deltas, encoded indices, and the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_child.codec import FormatError, encode
from peft_child.compose import Child, lock_of
from peft_child.delta import SparseDelta
from peft_child.index_buffers import IndexBuffers
from peft_child.mask import GradientMask, MaskUse, owner_of, watch
from peft_child.mask_buffers import MaskBuffers
from peft_child.ranks import check_whole, is_sharded
from peft_child.sparse_file import KINDS, MASK, check_numel, checked_child, fingerprint_of, precise_dtype
from peft_child.unheld import expect_optimizer


class Room(NamedTuple):
    """What the child of one parameter takes.

    Attributes:
        size: Chosen entries.
        num_bytes: Bytes of the index block.
        dtype: Dtype of the delta; float32 but for changes that only float64 can express.
    """

    size: int
    num_bytes: int
    dtype: torch.dtype = torch.float32


class ChildStorage(nn.Module, BaseTunerLayer):
    """The child networks of the adapters of one base layer, as ordinary tensors that every loader can read.

    Args:
        base_layer: The module, of any kind; it keeps its parameters, hooks and attributes.

    Attributes:
        child_targets: By adapter, the targeted parameters of the base layer with their names in the whole model.
        child_delta: By adapter and parameter, the trained change of the chosen entries, float32, shape `(k,)`.
        child_index: By adapter and parameter, the encoded flat indices of these entries, uint8.
        child_mask: By adapter and parameter, the packed mask of the delta's gradient, int64, if it is masked.
        child_masking: By adapter, the mask that new deltas start with, or None.
        child_chosen: By adapter, whether its child network has been chosen or loaded.
        child_awaits_file: By adapter, whether it was added for a file that has not been loaded.
        child_beside_shards: By adapter, whether its deltas are not sharded as the base layer is (FSDP2).
        child_ties: Parameters of this layer whose tensor also belongs to an earlier layer, which holds its delta.
    """

    adapter_layer_names = ("child_delta",)
    other_param_names = (
        "child_index",
        "child_mask",
        "child_masking",
        "child_targets",
        "child_chosen",
        "child_awaits_file",
        "child_beside_shards",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.child_delta = nn.ModuleDict()
        self.child_index = IndexBuffers()
        self.child_mask = MaskBuffers()
        self.child_masking: dict[str, GradientMask | None] = {}
        self.child_targets: dict[str, dict[str, str]] = {}
        self.child_chosen: dict[str, bool] = {}
        self.child_awaits_file: dict[str, bool] = {}
        self.child_beside_shards: dict[str, bool] = {}
        self.child_ties: dict[str, tuple[ChildStorage, str]] = {}
        self._number = watch(self)

    def add_adapter(
        self,
        adapter_name: str,
        targets: Mapping[str, str],
        ties: Mapping[str, tuple[ChildStorage, str]],
        mask: GradientMask | None = None,
    ) -> None:
        """Make room for an adapter whose child network is chosen or loaded later.

        Args:
            adapter_name: The new adapter.
            targets: Targeted parameters of the base layer and their names in the whole model.
            ties: Parameters that are tied to those of an earlier layer, with that layer and the name there.
            mask: Mask of the gradients of the deltas, as it starts; by default they are not masked.
        """
        self.child_delta[adapter_name] = nn.ParameterDict()
        self.child_index.add_adapter(adapter_name)
        self.child_mask.add_adapter(adapter_name)
        self.child_masking[adapter_name] = mask
        self.child_targets[adapter_name] = dict(targets)
        self.child_chosen[adapter_name] = not targets
        self.child_awaits_file[adapter_name] = False
        self.child_beside_shards[adapter_name] = False
        self.child_ties.update(ties)

    def base_parameter(self, name: str) -> nn.Parameter:
        """The parameter of the base layer, never composed."""
        with lock_of(self.base_layer):
            return self._base(name)

    def _base(self, name: str) -> nn.Parameter:
        parameter = self.base_layer._parameters.get(name)
        if parameter is None:
            raise RuntimeError(
                f"'{name}' has a child network, but is no parameter of the {type(self.base_layer).__name__} any more: "
                "it was quantised, parametrised or replaced. Call merge_and_unload() before such changes."
            )
        return parameter

    def set_child(self, adapter_name: str, children: Mapping[str, SparseDelta], trainable: bool) -> None:
        """Give an adapter its child network in this layer.

        Args:
            adapter_name: An adapter of this layer.
            children: By parameter; targets without one, or with an empty one, stay as they are in the base.
            trainable: Whether the deltas take gradients.
        """
        before = self._clear(adapter_name)
        for parameter in self.child_targets[adapter_name]:
            child = children.get(parameter)
            if child is None or not child.indices.numel():
                continue  # an empty delta would only trouble optimizers and sharding
            indices, values = child.indices, child.values
            base = self.base_parameter(parameter)
            block = encode(indices.cpu().numpy(), tuple(base.shape), fingerprint_of(base, indices))
            stored = torch.frombuffer(bytearray(block), dtype=torch.uint8).to(base.device)
            delta = _kept(before.get(parameter), values.detach().to(base.device, copy=True))
            self._put(adapter_name, parameter, delta, stored, trainable)
            self.child_index.remember(adapter_name, parameter, indices)
        self.child_chosen[adapter_name] = True
        self.child_awaits_file[adapter_name] = False

    def allocate(self, adapter_name: str, rooms: Mapping[str, Room], trainable: bool) -> None:
        """Make deltas and blocks of the given sizes, to be filled by a loader.

        Deltas that have their size already stay the objects they are, for optimizers that hold them.

        Args:
            adapter_name: An adapter of this layer.
            rooms: By parameter, for the parameters with a child.
            trainable: Whether new deltas take gradients.
        """
        if self._rooms(adapter_name) != dict(rooms):
            before = self._clear(adapter_name)
            for parameter in self.child_targets[adapter_name]:
                if parameter in rooms:
                    count, num_bytes, dtype = rooms[parameter]
                    device = self.base_parameter(parameter).device
                    block = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
                    delta = _kept(before.get(parameter), torch.zeros(count, dtype=dtype, device=device))
                    self._put(adapter_name, parameter, delta, block, trainable)
        self._forget(adapter_name)
        self.child_chosen[adapter_name] = True
        self.child_awaits_file[adapter_name] = False

    def rooms_in(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> dict[str, Room]:
        """By parameter, what the child network that a model's state dict has for this layer takes.

        Args:
            state_dict: Tensors by their names in the model.
            prefix: Name of this layer there, with a dot at the end.
            adapter_name: An adapter of this layer.

        Raises:
            FormatError: If a child network is damaged, or belongs to a tensor of another size.
        """
        rooms = {}
        for parameter, name in self.child_targets[adapter_name].items():
            keys = {kind: f"{prefix}{kind}.{adapter_name}.{parameter}" for kind in (*KINDS, MASK)}
            pair = {kind: state_dict[key] for kind, key in keys.items() if key in state_dict}
            if pair:
                child = checked_child(name, pair)
                check_numel(name, child, self.base_parameter(parameter))
                rooms[parameter] = Room(child.delta.numel(), child.block.numel(), precise_dtype(child.delta))
        return rooms

    def make_room(self, adapter_name: str, rooms: Mapping[str, Room]) -> None:
        """As `allocate`, where sizes differ; new deltas take gradients if the adapter is active.

        What is sharded (FSDP2) stays as it is, for torch to say what does not fit.
        """
        if any(map(is_sharded, self._deltas(adapter_name).values())):
            return
        present = {key: room[:2] for key, room in self._rooms(adapter_name).items()}
        if not self.child_chosen[adapter_name] or present != {key: room[:2] for key, room in rooms.items()}:
            self.allocate(adapter_name, rooms, adapter_name in self.active_adapters and not self.disable_adapters)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As torch's; a child network that was chosen in another model gets room first."""
        found = {adapter: self.rooms_in(state_dict, prefix, adapter) for adapter in self.child_targets}
        for adapter, rooms in found.items():
            if rooms:
                self.make_room(adapter, rooms)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def indices(self, adapter_name: str, parameter: str) -> Tensor:
        """Flat indices of the child in a parameter, int64, shape `(k,)`, on the device of the delta."""
        return self._indices(adapter_name, parameter).long()

    def _indices(self, adapter_name: str, parameter: str) -> Tensor:
        """The indices as they are kept."""
        if torch.compiler.is_dynamo_compiling():  # it cannot decode, nor ask whether something was loaded since
            _decode_now(self._number)
            return self.child_index.known(adapter_name, parameter)
        return self._present(adapter_name, parameter)

    def _present(self, adapter_name: str, parameter: str) -> Tensor:
        try:
            return self.child_index.present(adapter_name, parameter)
        except FormatError as error:
            name = self.child_targets[adapter_name][parameter]
            raise FormatError(f"The child of '{name}' (adapter '{adapter_name}'). {error}") from error

    def targeted(self) -> list[str]:
        """The parameters of the base layer that adapters target, those tied to another layer's included."""
        return list(
            dict.fromkeys([key for targets in self.child_targets.values() for key in targets] + [*self.child_ties])
        )

    def children_of(self, parameter: str, adapter_names: Collection[str]) -> Iterator[Child]:
        """The children of some adapters in one parameter of the base layer, those of tied parameters included."""
        holder, held = self.child_ties.get(parameter, (self, parameter))
        for adapter in holder.child_delta:  # in one order, so that the sum does not depend on that of the names
            if adapter in adapter_names and held in holder._deltas(adapter):
                yield holder._child(adapter, held)

    def _child(self, adapter_name: str, parameter: str) -> Child:
        delta, base = self._deltas(adapter_name)[parameter], self._base(parameter)
        is_whole = delta.numel() == base.numel()
        is_masked = parameter in self.child_mask.of(adapter_name)
        return Child(
            delta,
            None if is_whole else self._indices(adapter_name, parameter),
            MaskUse(self._number, f"{adapter_name}.{parameter}") if is_masked else None,
        )

    # Gradient masks

    def named_mask(self, key: str) -> tuple[str, GradientMask]:
        """Name in the whole model and present mask of a parameter, by `ADAPTER.PARAMETER`."""
        adapter, parameter = key.split(".")
        return self.child_targets[adapter][parameter], self.gradient_mask(adapter, parameter)

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

    def sizes(self, adapter_name: str) -> dict[str, list[int]]:
        """Entries, chosen entries and bytes of the block of the parameters with a child, by name in the model."""
        blocks = self.child_index.of(adapter_name)
        return {
            name: [self.base_parameter(key).numel(), self._deltas(adapter_name)[key].numel(), blocks[key].numel()]
            for key, name in self.child_targets[adapter_name].items()
            if key in blocks
        }

    def sparse_deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The adapter's children here by name in the whole model."""
        return {
            name: SparseDelta(
                tuple(self.base_parameter(key).shape), self.indices(adapter_name, key), self._deltas(adapter_name)[key]
            )
            for key, name in self.child_targets.get(adapter_name, {}).items()
            if key in self._deltas(adapter_name)
        }

    def named_numels(self, adapter_name: str) -> dict[str, int]:
        """Entries of the adapter's targets here by name in the whole model."""
        return {name: self.base_parameter(key).numel() for key, name in self.child_targets[adapter_name].items()}

    def named_deltas(self, adapter_name: str) -> dict[str, Tensor]:
        """The values of the adapter's deltas here by name in the whole model, shape `(k,)`, without gradients."""
        deltas = self._deltas(adapter_name)
        return {name: deltas[key].detach() for key, name in self.child_targets[adapter_name].items() if key in deltas}

    def keep(self, adapter_name: str, chosen: Mapping[str, Tensor]) -> None:
        """Keep a part of an adapter's child network here, no longer with masked gradients.

        Args:
            adapter_name: An adapter of this layer.
            chosen: Which values of its deltas to keep, by name in the whole model, int64, strictly increasing.
        """
        trainable = any(delta.requires_grad for delta in self._deltas(adapter_name).values())
        kept = {
            name: delta._replace(indices=delta.indices[chosen[name]], values=delta.values[chosen[name]])
            for name, delta in self.sparse_deltas(adapter_name).items()
        }
        self.child_masking[adapter_name] = None
        targets = self.child_targets[adapter_name]
        self.set_child(adapter_name, {key: kept[name] for key, name in targets.items() if name in kept}, trainable)

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the child network of an adapter has moved from the base here."""
        return any(bool(delta.any()) for delta in self._deltas(adapter_name).values())

    def _deltas(self, adapter_name: str) -> nn.ParameterDict:
        """The adapter's deltas by parameter; empty if it has none here."""
        return cast(nn.ParameterDict, self.child_delta._modules.get(adapter_name, {}))

    def _rooms(self, adapter_name: str) -> dict[str, Room]:
        """What the adapter's child networks take here at present."""
        blocks = self.child_index.of(adapter_name)
        return {
            key: Room(delta.numel(), blocks[key].numel(), delta.dtype)
            for key, delta in self._deltas(adapter_name).items()
        }

    def _clear(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Take an adapter's child network out; returns its deltas by parameter."""
        for name, delta in self.named_deltas(adapter_name).items():
            check_whole(name, delta, "give its adapter another child network before that")
        deltas = dict(self._deltas(adapter_name).items())
        self._deltas(adapter_name).clear()
        self.child_index.of(adapter_name).clear()
        self.child_mask.of(adapter_name).clear()
        self._forget(adapter_name)
        return deltas

    def _put(self, adapter_name: str, parameter: str, delta: nn.Parameter, block: Tensor, trainable: bool) -> None:
        self._deltas(adapter_name)[parameter] = delta.requires_grad_(trainable)
        expect_optimizer(delta)
        self.child_index.of(adapter_name)[parameter] = block
        self.child_beside_shards[adapter_name] = is_sharded(self.base_parameter(parameter))
        mask = self.child_masking[adapter_name]
        if mask is not None:
            self.child_mask.put(adapter_name, parameter, mask, block.device)

    def read_again(self) -> None:
        """Read indices and masks from their buffers again, after writes that autograd does not count."""
        self.child_index.read_again()
        self.child_mask.read_again()

    def _forget(self, adapter_name: str) -> None:
        self.child_index.forget(adapter_name)
        self.child_mask.read_again()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = watch(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def cast_deltas(self, adapter_name: str) -> None:
        """Give the deltas of an adapter the dtypes of their base parameters."""
        for parameter, delta in self._deltas(adapter_name).items():
            delta.data = delta.data.to(self.base_parameter(parameter).dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but deltas keep their precision whatever the dtype of the base."""
        if adapter_name in self.child_delta and not any(delta.is_meta for delta in self.child_delta.parameters()):
            device = device or next(self.base_layer.parameters()).device
            for held in (self.child_delta, self.child_index, self.child_mask):
                held[adapter_name].to(device)


def _kept(delta: nn.Parameter | None, values: Tensor) -> nn.Parameter:
    """The parameter that optimizers may hold with other values if they fit into it, otherwise a new one."""
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
    layer = cast(ChildStorage, owner_of(number))
    for adapter in layer.child_index:
        for parameter in layer.child_index.of(adapter):
            layer._present(adapter, parameter)
    return True
