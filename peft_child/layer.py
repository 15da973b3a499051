"""One targeted module with its adapters' child networks.

One class serves every kind of module, since all it does is to run the module with composed tensors in place of the
module's own parameters. What an adapter stores here is, for each parameter, the delta and the encoded index; both are
ordinary tensors in the state dict, so that every loader can read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from peft_child.codec import decode, encode
from peft_child.compose import Child, ComposedOnUse, Composition, call_composed, lock_of


class _Decoded(NamedTuple):
    """The index that was read from a block, and what tells whether the block is still the same."""

    block: Tensor
    version: int
    indices: Tensor


class _Replaced(NamedTuple):
    """Base values that a merge overwrote."""

    parameter: str
    indices: Tensor
    values: Tensor


class ChildTuningLayer(nn.Module, BaseTunerLayer):
    """A base layer whose parameters are composed with the child networks of the active adapters.

    Args:
        base_layer: The module, of any kind; it keeps its parameters, hooks and attributes.

    Attributes:
        child_targets: By adapter, the targeted parameters of the base layer with their names in the whole model.
        child_delta: By adapter and parameter, the trained change of the chosen entries, float32, shape `(k,)`.
        child_index: By adapter and parameter, the encoded flat indices of these entries, uint8.
        child_ties: Parameters of this layer whose tensor also belongs to an earlier layer, which holds its delta.
    """

    adapter_layer_names = ("child_delta",)
    other_param_names = ("child_index", "child_targets", "child_chosen")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.child_delta = nn.ModuleDict()
        self.child_index = nn.ModuleDict()
        self.child_targets: dict[str, dict[str, str]] = {}
        self.child_chosen: dict[str, bool] = {}
        self.child_ties: dict[str, tuple[ChildTuningLayer, str]] = {}
        self.merged_adapters: list[str] = []
        self._replaced: list[_Replaced] = []
        self._decoded: dict[tuple[str, str], _Decoded] = {}
        with warnings.catch_warnings():  # PEFT warns of every kind of module that it does not know itself
            warnings.simplefilter("ignore", UserWarning)
            features: tuple[int | None, int | None] = _get_in_out_features(base_layer)
        self.in_features, self.out_features = features

    # The adapters of this layer

    def add_adapter(
        self, adapter_name: str, targets: Mapping[str, str], ties: Mapping[str, tuple[ChildTuningLayer, str]]
    ) -> None:
        """Make room for an adapter whose child network is chosen or loaded later.

        Args:
            adapter_name: The new adapter.
            targets: Targeted parameters of the base layer and their names in the whole model.
            ties: Parameters that are tied to those of an earlier layer, with that layer and the name there.
        """
        self.child_delta[adapter_name] = nn.ParameterDict()
        self.child_index[adapter_name] = BufferDict(persistent=True)
        self.child_targets[adapter_name] = dict(targets)
        self.child_chosen[adapter_name] = not targets
        self.child_ties.update(ties)

    def base_parameter(self, name: str) -> nn.Parameter:
        """The parameter of the base layer, never composed."""
        with lock_of(self.base_layer):
            parameter = self.base_layer._parameters[name]
        assert parameter is not None
        return parameter

    def set_child(
        self, adapter_name: str, indices: Mapping[str, Tensor], init_weights: bool, trainable: bool
    ) -> dict[str, list[int]]:
        """Give an adapter its child network in this layer, with new deltas.

        Args:
            adapter_name: An adapter of this layer.
            indices: Strictly increasing flat indices, int64, shape `(k,)`, for every target; k may be 0.
            init_weights: Deltas of zero, or small random ones.
            trainable: Whether the deltas take gradients.

        Returns:
            The sizes for the configuration, by name in the whole model, of the parameters with a child.
        """
        self._clear(adapter_name)
        sizes = {}
        for parameter, name in self.child_targets[adapter_name].items():
            chosen = indices[parameter]
            if not chosen.numel():
                continue  # an empty delta would only trouble optimizers and sharding
            base = self.base_parameter(parameter)
            block = encode(chosen.cpu().numpy(), base.numel())
            delta = torch.zeros(chosen.numel()) if init_weights else torch.randn(chosen.numel()) * 0.02
            stored = torch.frombuffer(bytearray(block), dtype=torch.uint8).to(base.device)
            self._put(adapter_name, parameter, delta.to(base.device), stored, trainable)
            self._remember(adapter_name, parameter, chosen.to(base.device))
            sizes[name] = [base.numel(), chosen.numel(), len(block)]
        self.child_chosen[adapter_name] = True
        return sizes

    def allocate(self, adapter_name: str, sizes: Mapping[str, tuple[int, int]], trainable: bool) -> None:
        """Make deltas and blocks of the given sizes, to be filled by a loader.

        Deltas that have their size already stay the objects they are, for optimizers that hold them.

        Args:
            adapter_name: An adapter of this layer.
            sizes: Chosen entries and bytes of the block by parameter, for the parameters with a child.
            trainable: Whether new deltas take gradients.
        """
        deltas, blocks = self._deltas(adapter_name), self._blocks(adapter_name)
        if {name: (delta.numel(), blocks[name].numel()) for name, delta in deltas.items()} != dict(sizes):
            self._clear(adapter_name)
            for parameter in self.child_targets[adapter_name]:
                if parameter in sizes:
                    device = self.base_parameter(parameter).device
                    count, num_bytes = sizes[parameter]
                    block = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
                    self._put(adapter_name, parameter, torch.zeros(count, device=device), block, trainable)
        self.child_chosen[adapter_name] = True

    def indices(self, adapter_name: str, parameter: str) -> Tensor:
        """Flat indices of the child in a parameter, int64, shape `(k,)`, on the device of the delta."""
        block = self._blocks(adapter_name)[parameter]
        known = self._decoded.get((adapter_name, parameter))
        if known is None or known.block is not block or known.version != _version(block):
            with torch.inference_mode(False):  # else it could never be used in training
                known = self._remember(
                    adapter_name, parameter, torch.from_numpy(decode(block.cpu().numpy().data)).to(block.device)
                )
        return known.indices

    def children_of(self, parameter: str, adapter_names: Iterable[str]) -> Iterator[Child]:
        """The children of some adapters in one parameter of the base layer, those of tied parameters included."""
        holder, held = self.child_ties.get(parameter, (self, parameter))
        for adapter in adapter_names:
            deltas = holder._deltas(adapter)
            if held in deltas:
                yield Child(deltas[held], holder.indices(adapter, held))

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the child network of an adapter has moved from the base here."""
        return any(bool(delta.any()) for delta in self._deltas(adapter_name).values())

    def _deltas(self, adapter_name: str) -> nn.ParameterDict:
        """The adapter's deltas by parameter; empty if it has none here."""
        return cast(nn.ParameterDict, self.child_delta._modules.get(adapter_name, {}))

    def _blocks(self, adapter_name: str) -> BufferDict:
        return cast(BufferDict, self.child_index[adapter_name])

    def _clear(self, adapter_name: str) -> None:
        self._deltas(adapter_name).clear()
        self._blocks(adapter_name).clear()
        self._forget(adapter_name)

    def _put(self, adapter_name: str, parameter: str, delta: Tensor, block: Tensor, trainable: bool) -> None:
        self._deltas(adapter_name)[parameter] = nn.Parameter(delta, requires_grad=trainable)
        self._blocks(adapter_name)[parameter] = block

    def _remember(self, adapter_name: str, parameter: str, indices: Tensor) -> _Decoded:
        block = self._blocks(adapter_name)[parameter]
        decoded = self._decoded[adapter_name, parameter] = _Decoded(block, _version(block), indices)
        return decoded

    def _forget(self, adapter_name: str) -> None:
        self._decoded = {key: known for key, known in self._decoded.items() if key[0] != adapter_name}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles decode their indices again."""
        return {**self.__dict__, "_decoded": {}}

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with composed parameters."""
        self._check_chosen()
        if torch.compiler.is_compiling():
            return self._run(args, kwargs)
        with lock_of(self.base_layer):  # another thread may have its own tensors in the base layer
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compositions = self._compositions()
        if not compositions:
            return self.base_layer(*args, **kwargs)
        return call_composed(self.base_layer, compositions, args, kwargs)

    def _compositions(self) -> dict[str, Composition]:
        """Compositions of the parameters that the active adapters change at present."""
        if self.disable_adapters or self.merged:
            return {}
        found = {}
        for parameter, base in self.base_layer._parameters.items():
            children = tuple(self.children_of(parameter, self.active_adapters)) if base is not None else ()
            if children:
                assert base is not None
                if base.is_meta and not children[0].delta.is_meta:
                    raise RuntimeError(
                        f"Parameter '{parameter}' of a {type(self.base_layer).__name__} is offloaded (on the meta "
                        "device), which Child-Tuning does not support: load the base model without offloading, or "
                        "merge the adapter before dispatching it."
                    )
                found[parameter] = Composition(base, children)
        return found

    def _check_chosen(self) -> None:
        if not self.training or self.disable_adapters or not torch.is_grad_enabled():
            return
        for adapter in self.active_adapters:
            if not self.child_chosen.get(adapter, True):
                raise RuntimeError(
                    f"The child network of adapter '{adapter}' has not been chosen: call "
                    f"select_child_network(model, dataloader, adapter_name='{adapter}') before training."
                )

    # What other modules see of this one

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base layer, its parameters composed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):  # not set yet, or somebody's mark on the module itself
                raise
            return self._seen(name)

    @property
    def weight(self) -> Any:
        """The weight as the base layer computes with it, with its gradient path, for parents that read it."""
        return self._seen("weight")

    @property
    def bias(self) -> Any:
        """The bias as the base layer computes with it, with its gradient path, for parents that read it."""
        return self._seen("bias")

    def _seen(self, name: str) -> Any:
        if name not in self.base_layer._parameters:
            return getattr(self.base_layer, name)
        if torch.compiler.is_compiling():
            composition = self._compositions().get(name)
            return composition.tensor() if composition else getattr(self.base_layer, name)
        with lock_of(self.base_layer):
            composition = self._compositions().get(name)
            return ComposedOnUse(composition) if composition else getattr(self.base_layer, name)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the composed values into the base parameters, and keep what they overwrite.

        Args:
            safe_merge: Check that the composed values are finite before anything is written.
            adapter_names: The adapters; by default the active ones.

        Raises:
            ValueError: If `safe_merge` finds a NaN or infinite value.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.child_delta]
        if not names:
            return
        if safe_merge:
            self.check_finite(names)
        merged = [*self.merged_adapters, *names]
        self._restore()  # so that several adapters are summed before the one rounding
        self._write(merged)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Put back, bit for bit, what merging overwrote."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []

    @torch.no_grad()
    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Raise a `ValueError` if a composed value would not be finite."""
        for parameter, base, children in self._held(adapter_names or self.active_adapters):
            if not torch.isfinite(Composition(base.detach(), children).tensor()).all():
                raise ValueError(
                    f"Merging would give NaN or infinite values in '{parameter}' of a {type(self.base_layer).__name__}"
                    f" (adapters {adapter_names or self.active_adapters}); nothing was merged."
                )

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; a merged layer is unmerged when it is disabled."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _held(self, adapter_names: list[str]) -> Iterator[tuple[str, nn.Parameter, tuple[Child, ...]]]:
        """Parameters with children held here; those tied to another layer are that layer's to write."""
        for parameter in self.base_layer._parameters:
            children = () if parameter in self.child_ties else tuple(self.children_of(parameter, adapter_names))
            if children:
                yield parameter, self.base_parameter(parameter), children

    @torch.no_grad()
    def _write(self, adapter_names: list[str]) -> None:
        for parameter, base, children in self._held(adapter_names):
            composed = Composition(base.detach(), children).tensor().view(-1)
            indices = torch.cat([child.indices for child in children]) if len(children) > 1 else children[0].indices
            self._replaced.append(_Replaced(parameter, indices, _values_at(base, indices)))
            _set_values_at(base, indices, composed[indices])

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, indices, values in self._replaced:
            base = self.base_parameter(parameter)
            _set_values_at(base, indices.to(base.device), values.to(base.device))
        self._replaced = []

    # Devices and dtypes

    def cast_deltas(self, adapter_name: str) -> None:
        """Give the deltas of an adapter the dtypes of their base parameters."""
        for parameter, delta in self._deltas(adapter_name).items():
            delta.data = delta.data.to(self.base_parameter(parameter).dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but deltas keep their precision whatever the dtype of the base."""
        if adapter_name in self.child_delta and not any(delta.is_meta for delta in self.child_delta.parameters()):
            device = device or next(self.base_layer.parameters()).device
            self.child_delta[adapter_name].to(device)
            self.child_index[adapter_name].to(device)


def _version(block: Tensor) -> int:
    return 0 if block.is_inference() else block._version


def _values_at(base: Tensor, indices: Tensor) -> Tensor:
    return base.detach().reshape(-1)[indices]


def _set_values_at(base: Tensor, indices: Tensor, values: Tensor) -> None:
    if base.is_contiguous():
        base.detach().view(-1).index_copy_(0, indices, values)
    else:
        base.detach().copy_(base.detach().reshape(-1).index_copy(0, indices, values).view(base.shape))


def child_tuning_layers(model: nn.Module) -> dict[str, ChildTuningLayer]:
    """The Child-Tuning layers of a model by module name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ChildTuningLayer)}
