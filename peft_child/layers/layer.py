"""One targeted module, run with its adapters' child networks.

One class serves every kind of module, since all it does is to run the module with composed tensors in place of the
module's own parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import ismethod
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_child.layers.merging import MergingLayer
from peft_child.layers.mixed_batch import BASE, READ_DIRECTLY, MixedBatch
from peft_child.layers.packed import features_of
from peft_child.tensors.channel_linear import (
    call_adding_channels,
    call_channels,
    call_unpacked,
    can_add_channels,
    can_call_channels,
    is_observed,
)
from peft_child.tensors.compose import Composition, call_composed, is_traced, lock_of
from peft_child.tensors.composed_on_use import ComposedOnUse, ComposedToRead
from peft_child.tensors.partitioned import check_gathered, gather_with, has_hooks, is_away
from peft_child.tensors.quantised import PackedWeight, is_quantised


_LINEAR = {"weight", "bias"}  # the parameters of a linear layer

# Prefixes of the attributes with which accelerate, transformers, FSDP, DDP and DeepSpeed mark modules. A mark on the
# base layer says nothing about this layer, so these are not looked up there.
_MARKS = ("_hf_", "_is_hf_", "_old_forward", "_fsdp", "_is_fsdp", "_ddp", "_external_params", "_z3_leaf", "ds_")


class ChildTuningLayer(MergingLayer):
    """A base layer whose parameters are composed with the child networks of the active adapters.

    Args:
        base_layer: The module, of any kind; it keeps its parameters, hooks and attributes.
        quantization_backend: PEFT's backend to quantise its weight again, if it is quantised and can be.
    """

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer, quantization_backend)
        self._base_only = False
        self.mixed_batch: MixedBatch | None = None
        self._only: list[str] | None = None  # adapters in place of the active ones
        self.in_features, self.out_features = features_of(base_layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with composed parameters."""
        if self._can_be_packed and torch.compiler.is_compiling():
            return self._call_uncompiled(args, kwargs)
        return self._call(self.base_layer, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _call_uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `_call`, for a packed base layer: what unpacks weights cannot be traced."""
        return self._call(self.base_layer, args, kwargs)

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the base layer, or a method of it."""
        if self.mixed_batch is not None and self._only is None:
            return self.mixed_batch.call(partial(self._call_with, call), self.child_states, args, kwargs)
        with self._locked():
            if not torch.compiler.is_compiling():
                gather_with(self, self._read_here())
            compositions = self._compositions()
            if self._is_quantised(call, compositions):
                return self._call_quantised(compositions, args, kwargs)
            if call is not self.base_layer and self._packed() is not None:
                compositions.pop("weight", None)  # a method of a packed layer cannot be given another one
            if not compositions:
                return call(*args, **kwargs)
            if self.training and torch.is_grad_enabled() and getattr(self.base_layer, "gradient_checkpointing", False):
                # The base layer would recompute after this call, when its own parameters are back in place.
                raise RuntimeError(
                    f"A {type(self.base_layer).__name__} checkpoints its own activations, and would recompute them "
                    "without its child network: target the modules inside it, or turn checkpointing off."
                )
            weight = compositions.get("weight")
            if weight is not None and self._is_linear(call):
                compositions["weight"] = weight = weight.as_autocast()
                is_transposed = type(self.base_layer).forward is Conv1D.forward
                if len(args) == 1 and not kwargs and can_call_channels(self.base_layer, weight, is_transposed):
                    bias = compositions.get("bias")
                    own: Tensor | None = self.base_layer._parameters["bias"]
                    return call_channels(args[0], weight, own if bias is None else bias.tensor())
            return call_composed(self.base_layer, compositions, call, args, kwargs)

    def _is_quantised(self, call: Callable[..., Any], compositions: Mapping[str, Composition]) -> bool:
        """Whether the weight must be run in another way than as a dense one, since it is packed."""
        if call is not self.base_layer:
            return False
        is_linear = type(self.base_layer).forward is nn.Linear.forward
        weight = compositions.get("weight")
        if weight is not None:
            is_packed = isinstance(weight.base, PackedWeight)
            return is_packed or (is_linear and is_quantised(weight.base) and can_add_channels(weight))
        if not torch.is_grad_enabled():
            return False
        packed = self._packed()  # gradients have to reach its input all the same
        if packed is not None:
            return not packed.passes_gradients
        own = self.base_layer._parameters.get("weight")
        return is_linear and own is not None and is_quantised(own)

    def _call_quantised(
        self, compositions: dict[str, Composition], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        weight = compositions.pop("weight", None)
        if weight is not None and can_add_channels(weight):
            return call_adding_channels(self.base_layer, weight, compositions, args, kwargs)
        weight = weight or Composition(self._base("weight"), ())
        return call_unpacked(self.base_layer, weight, compositions.get("bias"), args, kwargs)

    def _call_with(
        self, call: Callable[..., Any], adapter_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As `_call`, with one adapter in place of the active ones, or with none (`BASE`)."""
        self._only = [] if adapter_name == BASE else [adapter_name]
        try:
            return self._call(call, args, kwargs)
        finally:
            self._only = None

    def _is_linear(self, call: Callable[..., Any]) -> bool:
        """Whether the call multiplies by the weight, and nothing else sees it."""
        is_own = call is self.base_layer and not is_observed(self.base_layer)
        return is_own and type(self.base_layer).forward in (nn.Linear.forward, Conv1D.forward)

    def _locked(self) -> AbstractContextManager[Any]:
        # Another thread may have swapped its composed tensors into the base layer. Compilers cannot trace a lock.
        return nullcontext() if torch.compiler.is_compiling() else lock_of(self.base_layer)

    def _compositions(self) -> dict[str, Composition]:
        """Compositions of the parameters that the active adapters change at present."""
        self._check_no_replica()
        if self._is_bare():
            return {}
        self._check_chosen()
        found = {}
        for name in self.targeted():
            composition = self._composition(name)
            if composition.children:
                self._check_present(name, composition.base)
                found[name] = composition
            elif is_away(composition.base) and not has_hooks(self.base_layer):  # else they gather it later
                check_gathered(f"Parameter '{self.name_of(name)}'", composition.base)
        return found

    def _read_here(self) -> Iterator[Tensor]:
        """The tensors that compositions are made from, which are parameters of other modules."""
        for name in () if self._is_bare() else self.targeted():
            yield self._base(name)
            yield from (delta for _, delta in self.deltas_of(name))

    def _composition(self, parameter: str) -> Composition:
        adapters = self.active_adapters if self._only is None else self._only
        return Composition(self._base(parameter), tuple(self.children_of(parameter, adapters)))

    def _is_bare(self) -> bool:
        """Whether the base parameters are used as they are."""
        return self.disable_adapters or self._base_only or self.merged

    def _check_no_replica(self) -> None:
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "Child-Tuning does not work in nn.DataParallel, whose replicas have no parameters: start one process "
                "for each device (torchrun or accelerate launch), or make only one visible (CUDA_VISIBLE_DEVICES)."
            )

    def _check_chosen(self) -> None:
        if not self.training or not torch.is_grad_enabled():
            return
        for adapter in self.active_adapters:
            self.check_is_chosen(adapter, "training")
            if self.has_adapter(adapter) and self.child_states[adapter].unsharded:
                raise RuntimeError(
                    f"Adapter '{adapter}' was added to a model that was sharded already, so its gradients would not "
                    "be averaged over the processes: to train it, save it and load it into a model before sharding."
                )

    # What other modules see of this one

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base layer, its parameters composed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith(_MARKS):
                raise
            return self._seen(name)

    @property
    def weight(self) -> Any:
        """The weight that the base layer computes with, differentiable, for parent modules that read it directly."""
        return self._seen("weight")

    @property
    def bias(self) -> Any:
        """The bias that the base layer computes with, differentiable, for parent modules that read it directly."""
        return self._seen("bias")

    def _seen(self, name: str) -> Any:
        if name not in self.targeted():
            value = getattr(self.base_layer, name)
            is_method = ismethod(value) and value.__self__ is self.base_layer
            return (lambda *args, **kwargs: self._call(value, args, kwargs)) if is_method else value
        if torch.compiler.is_compiling() or is_traced():  # they take plain tensors only
            composition = self._compositions().get(name)
            return getattr(self.base_layer, name) if composition is None else composition.tensor()
        with lock_of(self.base_layer):
            return self._composed(name)

    def _composed(self, name: str) -> Tensor:
        self._check_no_replica()
        if self._is_bare():
            return self._own(name)
        if self.mixed_batch is not None and self._only is None:
            children = tuple(self.children_of(name, self.mixed_batch.names))
            return (
                ComposedOnUse(Composition(self._base(name), children), READ_DIRECTLY) if children else self._own(name)
            )
        composition, refusal = self._composition(name), None
        try:
            self._check_chosen()
            self._check_present(name, composition.base)
        except RuntimeError as error:  # to be raised only if something computes with the tensor
            refusal = error
        if not composition.children and refusal is None:
            return self._own(name)
        if refusal is not None or torch.is_grad_enabled():
            return ComposedOnUse(composition, refusal)
        return ComposedToRead(composition)  # composed now; torch's fast paths take it for a plain tensor

    def _own(self, name: str) -> Tensor:
        """What the base layer itself has, packed if it is."""
        base = self._base(name)
        own: Tensor = getattr(self.base_layer, name) if isinstance(base, PackedWeight) else base
        return own

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's; base-layer parameters are set there, and those with a child network only to their own tensor."""
        base_layer = self.__dict__.get("_modules", {}).get("base_layer")
        if base_layer is None or name not in base_layer._parameters:
            super().__setattr__(name, value)
        elif name not in self.targeted():
            setattr(base_layer, name, value)
        # Tying weights again sets a composed tensor whose base is the parameter that is already there.
        elif base_layer._parameters[name] is not getattr(value, "composition", Composition(value, ())).base:
            raise RuntimeError(
                f"'{name}' of this {type(base_layer).__name__} has a child network, which belongs to the tensor that "
                "is there, so no other tensor can be set or tied: call unload() or merge_and_unload() first."
            )

    # Conversion to LoRA

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can approximate the child network here, which lies in a linear layer."""
        is_linear = self._packed() is not None or isinstance(self.base_layer, (nn.Linear, Conv1D))
        return is_linear and self.targets_of(adapter_name).keys() <= _LINEAR

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the weight, dense, for `convert_to_lora`; a change of the bias is left out, with a warning."""
        deltas = self._deltas(adapter_name)
        if "bias" in deltas and deltas["bias"].any():
            name = self.targets_of(adapter_name)["bias"]
            warnings.warn(f"LoRA cannot express the change of '{name}', which is left out.", stacklevel=2)
        base = self._base("weight")
        dense = torch.zeros(base.numel(), dtype=torch.float32, device=base.device)
        if "weight" in deltas:
            dense[self.indices(adapter_name, "weight")] = deltas["weight"].float()
        return dense.view(base.shape)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside this context, run as the base layer whatever is active; gradients may reach the base parameters."""
        was_base_only, self._base_only = self._base_only, True
        try:
            yield
        finally:
            self._base_only = was_base_only


def child_tuning_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, ChildTuningLayer]:
    """The Child-Tuning layers of a model, or those of one adapter, by module name in the order of `named_modules`."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, ChildTuningLayer))
    return {name: layer for name, layer in layers if adapter_name is None or layer.has_adapter(adapter_name)}
