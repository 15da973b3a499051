"""Linear layers whose weight cannot be read as it is: which they are, and how they take another weight.

They keep it quantised, or accelerate has offloaded it. What PEFT knows of a quantiser is taken from its backends; only
GGUF is known here, since PEFT does not know it. Weights that are packed as tensors of their own class (torchao) need
nothing of this.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from peft_child.tensors.quantised import PackedWeight, is_quantised


SUPPORTED = (
    "Quantised weights are supported in linear layers of bitsandbytes (4 and 8 bits), HQQ and GGUF and in tensors of "
    "torchao; with granularity='input_channel' also in those of GPTQ, AWQ, EETQ and AQLM"
)


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """The weight of a linear layer that keeps it packed or elsewhere; None for any other module."""
    weight = module._parameters.get("weight")
    if weight is not None and is_quantised(weight):
        return None
    if type(module) is nn.Linear:
        if weight is None or not weight.is_meta or not has_offloaded_params(module):
            return None
        device = torch.device(cast(Any, module)._hf_hook.execution_device)
        outputs, inputs = weight.shape
        return PackedWeight(module, (outputs, inputs), weight.dtype, device, partial(_load, module), True)
    kind = _KINDS.get(module) or _kind_of(module)
    if kind is None:
        return None
    _KINDS[module] = kind
    dtype = getattr(module, "compute_dtype", None) or torch.get_default_dtype()
    unpack = None if kind.unpack is None else partial(kind.unpack, module)
    return PackedWeight(module, kind.shape, dtype, next(tensors_of(module)).device, unpack, kind.passes_gradients)


class _Kind(NamedTuple):
    """What is known of a packed layer: see `PackedWeight`."""

    shape: tuple[int, int]
    unpack: Callable[[Any], Tensor] | None
    passes_gradients: bool


# Layers ask at every call, and PEFT takes longer to answer than a small layer takes to run.
_KINDS: WeakKeyDictionary[nn.Module, _Kind] = WeakKeyDictionary()


def _kind_of(module: nn.Module) -> _Kind | None:
    unpack: Callable[[Any], Tensor] | None
    if _is_gguf(module):
        unpack, passes_gradients = _unpack_gguf, False  # its kernels have no backward pass
    else:
        backend = resolve_quantization_backend(module)
        if backend is None or backend.layer_type != "linear":
            return None
        unpack, passes_gradients = backend.get_base_weight if backend.supports_merge else None, True
    width, height = features_of(module)
    return None if width is None or height is None else _Kind((height, width), unpack, passes_gradients)


def keep_packing(module: nn.Module) -> None:
    """Keep bitsandbytes from packing a 4-bit weight anew for a CPU with AVX512-BF16, when it first infers.

    That rounds the scales of the weight, and PEFT's backend would then unpack it wrongly.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.state_dict()  # brings a weight back that was packed anew before
        module.support_avx512bf16_for_cpu = cast(Any, False)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | PackedWeight]:
    """The parameters that a module owns itself, by name; a packed weight as the dense one that it stands for."""
    own = {name: value for name, value in module._parameters.items() if value is not None}
    packed = packed_weight(module)
    if packed is None:
        return {**own}
    return {"weight": packed, **{name: value for name, value in own.items() if name == "bias"}}


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that a module owns itself, as they are."""
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))


def features_of(module: nn.Module) -> tuple[int | None, int | None]:
    """PEFT's `in_features` and `out_features` of a module, None if it has no such thing."""
    with warnings.catch_warnings():  # it warns of every kind of module that it does not know
        warnings.simplefilter("ignore", UserWarning)
        try:
            return _get_in_out_features(module)
        except ValueError:  # raised for nn.MultiheadAttention whose keys or values differ in width from its queries
            return None, None


def backend_of(module: nn.Module, settings: Mapping[str, Any]) -> QuantizationBackend | None:
    """PEFT's way to quantise the weight of a module again; None if there is none, or the module is not quantised.

    Args:
        module: The module.
        settings: What PEFT's `get_quantization_kwargs` finds in the model.
    """
    try:
        backend = resolve_quantization_backend(module, **settings)
    except ValueError:  # torchao, and nothing says how the model was quantised
        return None
    return backend if backend is not None and backend.supports_merge else None


class Requantised:
    """A copy of a quantised module with another weight, made by a backend; the module stays as it was.

    Args:
        module: The module.
        backend: PEFT's backend for it.
        weight: The new weight, float, shape `(out, in)`.

    Attributes:
        base_layer: The copy.
    """

    def __init__(self, module: nn.Module, backend: QuantizationBackend, weight: Tensor) -> None:
        before = dict(vars(module))
        copied = self.base_layer = copy.deepcopy(module)
        backend.set_base_weight(self, weight)
        # Weights of bitsandbytes refer to the module that was copied, and have written to it.
        vars(module).update(before)
        new: Any = self.base_layer
        if "weight" in new._parameters and getattr(new.weight, "module", None) is module:
            new.weight.module, new.quant_state = new, new.weight.quant_state
        if new is not copied:  # that of HQQ makes a new module, and forgets the rest
            new.bias = copied.bias
            vars(new).update({name: value for name, value in vars(copied).items() if name.endswith("_hooks")})
            new.train(module.training)

    def get_base_layer(self) -> nn.Module:
        """The copy; PEFT's backends ask for it."""
        return self.base_layer


def _load(module: nn.Module) -> Tensor:
    """The weight that accelerate has offloaded to the CPU or the disk, on the device that the module runs on."""
    with align_module_device(module):
        return cast(Tensor, module.weight)


def _is_gguf(module: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.integrations.gguf.utils")  # not loaded, so no module is of its class
    return loaded is not None and isinstance(module, loaded.GgufLinear)


def _unpack_gguf(module: Any) -> Tensor:
    from transformers.integrations.gguf.kernels import dequantize_blocks

    rows, columns = module.out_features, module.in_features
    packed: Tensor = dequantize_blocks(module.weight.data, module.ggml_type, rows, columns, torch.float32)
    if module.input_permutation is None:
        return packed
    weight = torch.empty_like(packed)
    weight[:, module.input_permutation] = packed  # the layer permutes its input instead
    return weight
