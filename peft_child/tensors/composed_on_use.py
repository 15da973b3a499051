"""Composed weights as modules see them that read the weight of another module, instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peft_child.tensors.compose import Composition, composed_again_in_backward


READ_ONLY = (
    "A weight with a child network is composed whenever it is read, and what is written to it would be lost: write to "
    "the parameter of the layer's base_layer, or merge the adapter first."
)


class _Composed(torch.Tensor):
    """A composed weight that passes for the parameter that it stands for, but cannot be written."""

    _is_param = True  # what `isinstance(weight, nn.Parameter)` looks at
    composition: Composition

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(READ_ONLY)

    grad_fn = property(_refuse)  # a module asks that would register it as its own


class ComposedOnUse(_Composed):
    """A composed weight as a parent module sees it: asking for shape or dtype is free, computing composes it.

    Attributes:
        composition: What it stands for.
        refusal: The error for who computes with it, if it cannot be composed.
    """

    refusal: RuntimeError | None

    @staticmethod
    def __new__(cls, composition: Composition, refusal: RuntimeError | None = None) -> ComposedOnUse:
        """Stand for `composition`; the contiguous strides are those of the tensor that will be composed."""
        base = composition.base
        self: ComposedOnUse = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=composition.requires_grad()
        )
        self.composition, self.refusal = composition, refusal
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer questions about metadata, refuse to write, and compose for anything else."""
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DETACH and isinstance(first, cls):
            return cls(first.composition.detached(), first.refusal)
        if isinstance(kwargs.get("out"), cls) or (isinstance(first, cls) and _writes(func)):
            raise RuntimeError(READ_ONLY)
        composed: list[tuple[Composition, Tensor]] = []

        def compose(lazy: ComposedOnUse) -> Tensor:
            if lazy.refusal is not None:
                raise lazy.refusal
            composed.append((lazy.composition, lazy.composition.tensor()))
            return composed[-1][1]

        args, kwargs = tree_map_only(cls, compose, (args, kwargs))
        with composed_again_in_backward(composed):
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd it would be too late to compose: the delta would get no gradient."""
        raise RuntimeError(f"A composed weight reached {func} without __torch_function__; use `weight.clone()` there.")


_QUESTIONS = (
    *("size", "stride", "dim", "numel", "element_size", "get_device", "is_contiguous", "is_floating_point"),
    *("is_complex", "__len__"),
)
_PROPERTIES = (
    *("dtype", "shape", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad"),
    *("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized"),
)
_METADATA = {
    *(getattr(torch.Tensor, name) for name in _QUESTIONS),
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
}
_DETACH = {torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument, or keeps something for it."""
    name = func.__name__
    if name.endswith("__"):
        return name.startswith(("__i", "__set")) and name not in {"__index__", "__int__", "__invert__"}
    return name.endswith("_") or name in {"register_hook", "retain_grad"}


class ComposedToRead(_Composed):
    """A weight composed without gradients, which torch's fast paths take for a plain tensor.

    It is an inference tensor, so that torch refuses to change it in place.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, composition: Composition) -> ComposedToRead:
        """Compose now."""
        with torch.inference_mode():
            self = composition.tensor().as_subclass(cls)
        self.composition = composition
        return self

    def detach(self) -> ComposedToRead:
        """Itself, for torch would let an alias be written."""
        return self

    data = property(detach, _Composed._refuse)
