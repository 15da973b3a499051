"""Linear layers with a child network whose module is not simply called with another weight.

With input channels, backward computes the gradients of these columns only. A layer that keeps its weight packed cannot
be given another one: what channels add is added to its output, and single entries run on the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from peft_child.tensors.channels import Channels
from peft_child.tensors.compose import Child, Composition, Index, call_composed, delta_gradient, is_traced
from peft_child.tensors.mask_steps import MaskUse
from peft_child.tensors.quantised import PackedWeight, is_quantised


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_observed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own, such as accelerate's, which works as a hook does."""
    return "forward" in vars(module) or any(map(module.__dict__.get, _HOOKS)) or _has_any_global_hook()


def can_call_channels(module: nn.Module, weight: Composition, is_transposed: bool) -> bool:
    """Whether a linear layer has no hooks, and only input channels of its weight are trained.

    Args:
        module: The layer.
        weight: Its weight.
        is_transposed: Whether the weight has the shape `(in, out)`, so that input channels are its rows. In a head
            that is tied to the embeddings channels are rows although the weight is not transposed: such a head is
            not called this way.
    """
    # Without gradients nothing is kept anyway, and a base that is trained needs the gradient of every column.
    if not torch.is_grad_enabled() or weight.base.requires_grad or is_traced():  # a trace holds no gradients of ours
        return False
    if is_observed(module):  # the module itself is not called, so its hooks would not run
        return False
    if torch.compiler.is_compiling() and any(child.mask is not None for child in weight.children):
        return False  # its operator stands in the backward function of a composed weight
    return all(
        isinstance(child.indices, Channels)
        and child.indices.layout.are_rows(len(weight.base)) == is_transposed
        and child.delta.requires_grad
        for child in weight.children
    )


def call_channels(x: Tensor, weight: Composition, bias: Tensor | None) -> Tensor:
    """Run a linear layer with the composed weight, keeping only the inputs of the chosen channels for backward.

    With output gradients d, the gradient of some columns of the weight is `d.T @ x[..., columns]`: at a density of 0.1
    a tenth of the work that the whole gradient takes.

    Args:
        x: Inputs, shape `(..., in)`.
        weight: The weight; its children are input channels. They tell whether its shape is `(out, in)`, as in
            `nn.Linear`, or `(in, out)`, as in the Conv1D of transformers.
        bias: Shape `(out,)`, or None.
    """
    if torch.compiler.is_compiling():
        return _in_operations(x, weight, bias)
    return _recipe_linear(x, weight, bias)


def _in_operations(x: Tensor, weight: Composition, bias: Tensor | None) -> Tensor:
    """The same for a compiler, which takes the graph apart: what a delta adds to the output is added as a zero."""
    is_transposed = _is_transposed(weight)
    y = _linear(x, weight.detached().tensor(), bias, is_transposed)
    for child in weight.children:
        if isinstance(child.indices, Channels):
            block = child.indices.as_block(child.delta.to(x.dtype)).squeeze(0 if is_transposed else 2)
            kept = x.detach().index_select(-1, child.indices.chosen)
            added = kept @ (block if is_transposed else block.T)
            y = y + (added - added.detach())
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """The very operation of a Conv1D or a linear layer, so that no bit differs."""
    if is_transposed:
        return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)  # type: ignore[arg-type]
    return F.linear(x, weight, bias)


def can_add_channels(weight: Composition) -> bool:
    """Whether the module can run its quantised weight itself, and what the children add be added to its output.

    So the packed kernel does the work. It has to be able to pass on gradients, if they are wanted; and the children
    have to be input channels.
    """
    passes = not torch.is_grad_enabled() or getattr(weight.base, "passes_gradients", False)
    return passes and all(isinstance(child.indices, Channels) for child in weight.children)


def call_adding_channels(
    module: nn.Module,
    weight: Composition,
    others: Mapping[str, Composition],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a linear layer as it is, and add to its output what input channels change in it; its hooks run as usual.

    Args:
        module: The layer.
        weight: Its weight, shape `(out, in)`; all children are input channels.
        others: Compositions of its other parameters.
        args: The input of the layer, shape `(..., in)`, positional
        kwargs: or by name.

    Returns:
        The output, shape `(..., out)`, in the dtype that the layer gives it.
    """
    own = getattr(module, _name_of_forward(module))

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return _add_channels(own(*args, **kwargs), x, weight)

    with _instead_of_forward(module, forward):
        return call_composed(module, others, module, args, kwargs)


def _add_channels(y: Tensor, x: Tensor, weight: Composition) -> Tensor:
    dtype = _computes_in(weight.base) or x.dtype
    for child in weight.children:
        if isinstance(child.indices, Channels):
            delta = child.delta.to(dtype)
            if child.mask is not None:
                delta = _Masked.apply(delta, child.mask)  # type: ignore[no-untyped-call]
            block = child.indices.as_block(delta).squeeze(2)
            y = y + F.linear(x.index_select(-1, child.indices.chosen).to(dtype), block).to(y.dtype)
    return y


def call_unpacked(
    module: nn.Module, weight: Composition, bias: Composition | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Call a linear layer with its packed weight unpacked and composed, for this call only; its hooks run as usual.

    Args:
        module: The layer.
        weight: Its weight, shape `(out, in)`; it is unpacked and composed again in backward.
        bias: Shape `(out,)`; by default that of the layer.
        args: The input of the layer, positional
        kwargs: or by name.

    Returns:
        The output, in the dtype of the input, or in that of autocast.
    """

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        x_in = x.to(weight.base.device, _computes_in(weight.base) or x.dtype)
        b: Tensor | None = getattr(module, "bias", None) if bias is None else bias.tensor()
        y = _recipe_linear(x_in, weight, None if b is None else b.to(x_in.dtype))
        # The output has the dtype of the input, or that of autocast, which such layers do without.
        return y.to(x.dtype) if _computes_in(weight.base) or not torch.is_autocast_enabled(x.device.type) else y

    with _instead_of_forward(module, forward):
        y: Tensor = module(*args, **kwargs)
    return y


@contextmanager
def _instead_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    name = _name_of_forward(module)
    before = vars(module).get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        del module.__dict__[name]
        if before is not None:
            module.__dict__[name] = before


def _name_of_forward(module: nn.Module) -> str:
    """The forward inside that of accelerate, if it has wrapped one, which loads what is offloaded."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _computes_in(weight: Tensor) -> torch.dtype | None:
    """The dtype that a layer computes in whatever its input has, as those of bitsandbytes and HQQ do."""
    return getattr(weight.module, "compute_dtype", None) if isinstance(weight, PackedWeight) else None


class _Masked(torch.autograd.Function):
    """A delta whose gradient is masked (CT_F)."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, mask: MaskUse) -> Tensor:
        ctx.mask = mask
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.mask.apply(gradient), None


def _recipe_linear(x: Tensor, weight: Composition, bias: Tensor | None) -> Tensor:
    y: Tensor = _RecipeLinear.apply(x, bias, weight, *(child.delta for child in weight.children))  # type: ignore[no-untyped-call]
    return y


class _RecipeLinear(torch.autograd.Function):
    """A linear layer that composes its weight again in backward, and keeps of its input what its deltas need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Composition, *deltas: Tensor) -> Tensor:
        ctx.weight, ctx.versions, ctx.is_transposed = weight, weight.versions(), _is_transposed(weight)
        dense = weight.tensor()
        if is_quantised(weight.base) and not torch.is_autocast_enabled(x.device.type):
            dense = dense.to(x.dtype)  # unpacked for this call; a dense base of another dtype is an error
        y = _linear(x, dense, bias, ctx.is_transposed)
        ctx.dtypes = [delta.dtype for delta in deltas]
        ctx.dtype = x.dtype
        # Autocast may have run in a lower precision; backward uses the same one.
        ctx.save_for_backward(*(_needed_of(x, child.indices).to(y.dtype) for child in weight.children))
        return y

    @staticmethod
    @once_differentiable  # the weight is composed again without a graph: second derivatives would be wrong
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight: Composition = ctx.weight
        needs_x, needs_bias, _, *needed = ctx.needs_input_grad
        of_x = of_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):  # forward has chosen the dtypes
            if needs_x:
                dense = weight._replace(dtype=gradient.dtype).unchanged(ctx.versions)
                of_x = (gradient @ (dense.T if ctx.is_transposed else dense)).to(ctx.dtype)
                del dense  # before the gradient of a weight takes as much
            if needs_bias:
                of_bias = flat.sum(0)
            found: list[Tensor | None] = []
            for kept, child, dtype, is_needed in zip(
                ctx.saved_tensors, weight.children, ctx.dtypes, needed, strict=True
            ):
                left, right = (kept, flat) if ctx.is_transposed else (flat, kept)
                found.append(_gradient_of(left, right, child, dtype) if is_needed else None)
        return of_x, of_bias, None, *found


def _needed_of(x: Tensor, index: Index) -> Tensor:
    """What the gradient of a delta needs of the input: the chosen channels, or all of them for single entries."""
    return x.index_select(-1, index.chosen) if isinstance(index, Channels) else x


def _is_transposed(weight: Composition) -> bool:
    layouts = [child.indices.layout for child in weight.children if isinstance(child.indices, Channels)]
    # `can_call_channels` has checked that all agree; packed weights are never transposed.
    return bool(layouts) and layouts[0].are_rows(len(weight.base))


def _gradient_of(left: Tensor, right: Tensor, child: Child, dtype: torch.dtype) -> Tensor:
    whole = (left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])).reshape(-1)
    if not isinstance(child.indices, Channels):
        return delta_gradient(whole, child.indices, child.mask, dtype)
    found = whole.to(dtype)  # of the chosen channels alone
    return found if child.mask is None else child.mask.apply(found)
