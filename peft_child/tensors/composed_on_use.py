"""Composed weights, as seen by modules that read the weight of another module instead of calling that module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from peft_child.tensors.compose import Composition, changes_in, composed_again_in_backward


READ_ONLY = (
    "A weight with a child network is composed whenever it is read, and what is written to it would be lost: write to "
    "the parameter of the layer's base_layer, or merge the adapter first."
)


class _Composed(torch.Tensor):
    """A composed weight that passes for the parameter that it stands for, but cannot be written."""

    _is_param = True  # what `isinstance(weight, nn.Parameter)` looks at
    composition: Composition
    _itself: weakref.ref[Tensor]  # `torch.utils.swap_tensors` refuses tensors that have weak references
    refusal: RuntimeError | None = None  # raised when something computes with it, if it cannot be composed

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(READ_ONLY)

    grad_fn = property(_refuse)  # read by a module that would register the weight as its own parameter

    def __iter__(self) -> Iterator[Tensor]:
        """The rows; torch would give them out without asking `__torch_function__`."""
        return iter(self.unbind())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """The values, or why there are none."""
        return f"{type(self).__name__}({self.refusal or self.composition.detached().tensor()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A frozen parameter with the same values; the child network stays where it is."""
        if self.refusal is not None:
            raise self.refusal
        return nn.Parameter(self.composition.detached().tensor(), requires_grad=False)


class ComposedOnUse(_Composed):
    """A composed weight as a parent module sees it: asking for shape or dtype is free, computing composes it."""

    @staticmethod
    def __new__(cls, composition: Composition, refusal: RuntimeError | None = None) -> ComposedOnUse:
        """Stand in for `composition`; the strides are contiguous, as those of the composed tensor will be."""
        base = composition.base
        self: ComposedOnUse = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=composition.requires_grad()
        )
        self.composition, self.refusal = composition, refusal
        self._itself = weakref.ref(self)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer questions about metadata, refuse to write, and compose for anything else."""
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)  # it may be given by name: neg(input=weight)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DETACH and isinstance(first, cls):
            return cls(first.composition.detached(), first.refusal)  # `weight.data.dtype` composes nothing
        # Writes are recognised by name, since an operation has several functions: torch.relu_ and Tensor.relu_.
        if isinstance(kwargs.get("out"), cls) or (isinstance(first, cls) and func.__name__ in _REFUSED):
            raise RuntimeError(READ_ONLY)
        composed: list[tuple[Composition, Tensor]] = []

        def compose(lazy: ComposedOnUse) -> Tensor:
            if lazy.refusal is not None:
                raise lazy.refusal
            composed.append((lazy.composition, lazy.composition.tensor()))
            return composed[-1][1]

        args, kwargs = tree_map_only(cls, compose, (args, kwargs))
        with composed_again_in_backward(composed):
            return _unwritten(func, args, kwargs, [tensor for _, tensor in composed])

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
# What changes its first argument, or keeps something for it: setters of properties, methods, `__iadd__` and the like.
_REFUSED = {
    *("__set__", "__setitem__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    *(name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")),
    *(name for name in dir(torch.Tensor) if name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}")),
}


def _unwritten(func: Callable[..., Any], args: Any, kwargs: Any, composed: Sequence[Tensor]) -> Any:
    """Call a function that must not write to composed tensors; views of them in its result are read-only."""
    before = [changes_in(tensor) for tensor in composed]
    result = func(*args, **kwargs)
    if before != [changes_in(tensor) for tensor in composed]:
        raise RuntimeError(READ_ONLY)
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    storages = {tensor.untyped_storage().data_ptr() for tensor in composed}

    def read_only(tensor: Tensor) -> Tensor:
        # Tensors of other layouts, such as sparse ones, have no storage to compare.
        is_view = tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in storages
        return tensor.as_subclass(_View) if is_view else tensor

    return tree_map_only(Tensor, read_only, result)


class _View(torch.Tensor):
    """A view of a composed tensor, which cannot be written either."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function unless it writes; weights that are not composed yet come first."""
        if any(issubclass(kind, ComposedOnUse) for kind in types):
            return NotImplemented
        views = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            return _unwritten(func, args, kwargs or {}, views)


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
        self._itself = weakref.ref(self)
        return self

    def detach(self) -> ComposedToRead:
        """Return itself, since torch would return an alias that can be written to."""
        return self

    data = property(detach, _Composed._refuse)
    grad = property(lambda _: None, _Composed._refuse)

    def numpy(self, **options: Any) -> Any:
        """As torch's, and read-only as well."""
        array = super().numpy(**options)
        array.flags.writeable = False
        return array


# In inference mode torch does change inference tensors in place. A class with `__set__` would be a descriptor.
for name in _REFUSED - {"__set__"}:
    setattr(ComposedToRead, name, _Composed._refuse)
