"""The composed weight: base plus delta forward, gather backward, nothing kept in between.

A child network of a tensor is a compact 1-D delta and the flat indices of the entries that it moves. The tensor that a
module computes with is composed from the frozen base and the delta when the module runs, and composed again when
backward asks for it, so that no copy of the weight lives from forward to backward. Backward gathers the chosen entries
from the dense gradient and drops the others: this is the fixed mask of CT_D. The random mask of CT_F, if there is one,
is applied to the gathered entries (`delta_gradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_child.tensors.channels import Channels
from peft_child.tensors.delta import rounded_sum
from peft_child.tensors.mask_steps import MaskUse
from peft_child.tensors.partitioned import is_partitioned
from peft_child.tensors.quantised import dense


Index = Tensor | Channels | None


def changes_in(tensor: Tensor) -> int:
    """Count of the in-place changes of a tensor that autograd knows of; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


class Child(NamedTuple):
    """One adapter's child network in one tensor.

    Attributes:
        delta: Change of the chosen entries, float, shape `(k,)`.
        indices: Flat row-major positions of the chosen entries, int32 or int64, shape `(k,)`, strictly increasing; or
            `Channels`, if they are whole input channels; or None for all entries of the tensor.
        mask: The mask of the delta's gradient, if it has one.
    """

    delta: Tensor
    indices: Index
    mask: MaskUse | None = None


class Composition(NamedTuple):
    """A tensor that is composed when it is needed: a base and the children that are added to it.

    Attributes:
        base: The frozen tensor, any shape and floating dtype, dense or quantised. It is never written.
        children: The children to add; deltas add up where they overlap.
        dtype: That of the composed tensor, if it is not that of the base.
    """

    base: Tensor
    children: tuple[Child, ...]
    dtype: torch.dtype | None = None

    def tensor(self) -> Tensor:
        """The composed tensor, of the shape of the base, differentiable; it is rounded to the base's dtype first."""
        if not self.children:
            return dense(self.base).to(self.dtype or self.base.dtype)
        deltas, indices, masks = zip(*self.children, strict=True)
        if is_traced():  # a TorchScript program holds no Python functions
            return _composed(dense(self.base), deltas, indices, self.dtype)
        composed: Tensor = _Compose.apply(self.base, self.dtype, indices, masks, *deltas)  # type: ignore[no-untyped-call]
        return composed

    def as_autocast(self) -> Composition:
        """The same in the dtype that autocast would cast it to, so that no copy in that of the base is made."""
        device = self.base.device.type
        is_cast = torch.is_autocast_enabled(device) and self.base.dtype != torch.float64
        if not is_cast or torch.compiler.is_compiling():  # what is exported may run outside autocast
            return self
        return self._replace(dtype=torch.get_autocast_dtype(device))

    def detached(self) -> Composition:
        """The same values without gradients."""
        children = tuple(child._replace(delta=child.delta.detach()) for child in self.children)
        return self._replace(base=self.base.detach(), children=children)

    def requires_grad(self) -> bool:
        """Whether the composed tensor would take gradients now."""
        tensors = (self.base, *(child.delta for child in self.children))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def unchanged(self, versions: tuple[int, ...]) -> Tensor:
        """The composed tensor without gradients, as it was when `versions` were read.

        Raises:
            RuntimeError: If something was changed in place since then.
        """
        if self.versions() != versions:
            raise RuntimeError(
                "A base weight or child_delta was changed in place between forward and backward; "
                "run forward again after the change."
            )
        with torch.no_grad():
            return self.tensor()

    def versions(self) -> tuple[int, ...]:
        """Counts of the in-place changes that autograd knows of, to notice one between forward and backward."""
        tensors = (self.base, *(child.delta for child in self.children))
        return tuple(map(changes_in, tensors))


def is_traced() -> bool:
    """Whether `torch.jit.trace` records what is computed now."""
    found: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call,attr-defined]
    return found


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        dtype: torch.dtype | None,
        indices: tuple[Index, ...],
        masks: tuple[MaskUse | None, ...],
        *deltas: Tensor,
    ) -> Tensor:
        ctx.masks = masks
        ctx.indices = indices  # constants: `save_for_backward` would let offloading hooks copy them at every step
        ctx.dtypes = [delta.dtype for delta in deltas]
        return _composed(dense(base), deltas, indices, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient.is_sparse:  # nn.Embedding(sparse=True)
            gradient = gradient.to_dense()
        flat = gradient.reshape(-1)
        gathered = [
            delta_gradient(flat, index, mask, dtype) if needed else None
            for index, mask, dtype, needed in zip(
                ctx.indices, ctx.masks, ctx.dtypes, ctx.needs_input_grad[4:], strict=True
            )
        ]
        return gradient if ctx.needs_input_grad[0] else None, None, None, None, *gathered


def positions_of(index: Tensor | Channels) -> Tensor:
    """Flat positions, int64, shape `(k,)`."""
    return index.positions() if isinstance(index, Channels) else index.long()


def delta_gradient(gradient: Tensor, indices: Index, mask: MaskUse | None, dtype: torch.dtype) -> Tensor:
    """The gradient of one delta, from that of the whole tensor, flat: its entries, cast, then masked (CT_F)."""
    if isinstance(indices, Channels):
        gradient = indices.of(gradient).index_select(1, indices.chosen).view(-1)
    elif indices is not None:
        gradient = gradient.index_select(0, indices)
    gathered = gradient.to(dtype)
    return gathered if mask is None else mask.apply(gathered)


def _composed(base: Tensor, deltas: Sequence[Tensor], indices: Sequence[Index], dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy of `base`, the deltas added in at least float32, rounded to its dtype and then to `dtype`."""
    dtype = dtype or base.dtype
    precise = torch.promote_types(base.dtype, torch.float32)
    for delta in deltas:
        precise = torch.promote_types(precise, delta.dtype)
    # Several deltas are summed before the one rounding, so the whole tensor needs the wider type.
    if base.dtype == dtype == precise or len(deltas) > 1:
        total = base.to(precise, copy=True, memory_format=torch.contiguous_format)
        for delta, index in zip(deltas, indices, strict=True):
            if index is None:
                total.view(-1).add_(delta)
            elif isinstance(index, Channels):
                index.add_to(total, delta.to(precise))
            else:
                total.view(-1).index_add_(0, index, delta.to(precise))
        return total.to(base.dtype).to(dtype)
    (delta,), (index,) = deltas, indices
    if index is None:
        return rounded_sum(base.reshape(-1), delta).view(base.shape).to(dtype)
    base = base.contiguous()
    total = base.to(dtype, copy=True)  # only the chosen entries need the wider type
    if isinstance(index, Channels):
        before = index.of(base).index_select(1, index.chosen)
        index.of(total).index_copy_(1, index.chosen, rounded_sum(before, index.as_block(delta)).to(dtype))
        return total
    # Unlike index_select and index_add_, index_copy_ does not take int32.
    after = rounded_sum(base.view(-1).index_select(0, index), delta)
    total.view(-1).index_copy_(0, index.long(), after.to(dtype))
    return total


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # not on the modules: locks cannot be copied


def lock_of(module: nn.Module) -> RLock:
    """The lock under which the parameters of `module` are read or swapped, one for each module."""
    # Re-entrant, since its holder calls functions that take it again. `setdefault` gives two threads the same lock.
    return _LOCKS.setdefault(module, RLock())


def call_composed(
    module: nn.Module, compositions: Mapping[str, Composition], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Call a module, or a method of it, with composed tensors in place of the module's own parameters.

    The caller holds `lock_of(module)`: other threads that look at the parameters meanwhile see the composed tensors.
    Hooks of the module run as usual. No composed tensor is kept for backward.

    Args:
        module: The module; its parameters are back in place when the call ends, however it ends.
        compositions: Compositions by the name of a parameter that `module` itself owns.
        call: The module or one of its bound methods.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        What the call returns.
    """
    tensors = {name: composition.tensor() for name, composition in compositions.items()}
    if torch.compiler.is_compiling() and call is module:  # the compiler decides what it computes again in backward
        return torch.func.functional_call(module, tensors, args, kwargs)
    pairs = [(composition, tensors[name]) for name, composition in compositions.items()]
    with _swapped(module, tensors), composed_again_in_backward(pairs):
        return call(*args, **kwargs)


@contextmanager
def _swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `tensors` in the place of the parameters of `module`, and the parameters back at the end.

    FSDP keeps its parameters in the instance dictionary as well, where attribute lookup finds them first. That is also
    where tensors are put for a module that ZeRO-3 has partitioned: DeepSpeed's hooks look for its parameters.
    """
    own = {name: module._parameters[name] for name in tensors}
    shadows = {name: module.__dict__.pop(name) for name in tensors if name in module.__dict__}
    is_hooked = any(parameter is not None and is_partitioned(parameter) for parameter in own.values())
    try:
        (module.__dict__ if is_hooked else module._parameters).update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        if is_hooked:
            for name in tensors:
                module.__dict__.pop(name, None)
        else:
            module._parameters.update(own)
        module.__dict__.update(shadows)
        if isinstance(module, nn.RNNBase):  # it remembers the tensors that it ran with
            module._init_flat_weights()


class _Recipe(NamedTuple):
    """What autograd keeps instead of a composed tensor, or of a view of it."""

    composition: Composition
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.composition.unchanged(self.versions).as_strided(self.size, self.stride, self.offset)


@contextmanager
def composed_again_in_backward(composed: Iterable[tuple[Composition, Tensor]]) -> Iterator[None]:
    """Let autograd save a recipe instead of each composed tensor.

    Tensors that are not ours go to the hooks around this call, such as those of activation checkpointing, which would
    otherwise not see them.
    """
    if not torch.is_grad_enabled():
        yield
        return
    # By storage, since autograd may save a view, such as the transpose.
    recipes = {tensor.untyped_storage().data_ptr(): composition for composition, tensor in composed}
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    keep, give_back = outer if outer else (lambda tensor: tensor, lambda kept: kept)

    def pack(tensor: Tensor) -> Any:
        composition = recipes.get(tensor.untyped_storage().data_ptr())
        if composition is None:
            return keep(tensor)
        return _Recipe(
            composition, composition.versions(), tensor.size(), tensor.stride(), int(tensor.storage_offset())
        )

    def unpack(kept: Any) -> Tensor:
        tensor: Tensor = kept.tensor() if isinstance(kept, _Recipe) else give_back(kept)
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        recipes.clear()  # the hooks outlive the composed tensors, whose addresses may be reused
