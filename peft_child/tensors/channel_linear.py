"""A linear layer with a child network of input channels, whose backward pass computes only their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from peft_child.tensors.channels import Channels
from peft_child.tensors.compose import Composition
from peft_child.tensors.mask_steps import MaskUse
from peft_child.tensors.quantised import is_quantised


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


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
    if not torch.is_grad_enabled() or weight.base.requires_grad or is_quantised(weight.base):
        return False
    # The module itself is not called, so its hooks would not run. A forward on the instance, such as accelerate's,
    # wraps the original one as a hook does.
    if any(map(module.__dict__.get, _HOOKS)) or "forward" in vars(module) or _has_any_global_hook():
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
    y: Tensor = _ChannelLinear.apply(x, bias, weight, *(child.delta for child in weight.children))  # type: ignore[no-untyped-call]
    return y


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


class _ChannelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Composition, *deltas: Tensor) -> Tensor:
        ctx.weight, ctx.versions, ctx.is_transposed = weight, weight.versions(), _is_transposed(weight)
        y = _linear(x, weight.tensor(), bias, ctx.is_transposed)
        ctx.dtypes = [delta.dtype for delta in deltas]
        ctx.dtype = x.dtype
        chosen = [child.indices.chosen for child in weight.children if isinstance(child.indices, Channels)]
        # Autocast may have run in a lower precision; backward uses the same one.
        ctx.save_for_backward(*(x.index_select(-1, numbers).to(y.dtype) for numbers in chosen))
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
                dense = weight.unchanged(ctx.versions).to(gradient.dtype)
                of_x = (gradient @ (dense.T if ctx.is_transposed else dense)).to(ctx.dtype)
            if needs_bias:
                of_bias = flat.sum(0)
            found: list[Tensor | None] = []
            for kept, child, dtype, is_needed in zip(
                ctx.saved_tensors, weight.children, ctx.dtypes, needed, strict=True
            ):
                left, right = (kept, flat) if ctx.is_transposed else (flat, kept)
                found.append(_channel_delta_gradient(left, right, child.mask, dtype) if is_needed else None)
        return of_x, of_bias, None, *found


def _is_transposed(weight: Composition) -> bool:
    layouts = [child.indices.layout for child in weight.children if isinstance(child.indices, Channels)]
    return layouts[0].are_rows(len(weight.base))  # `can_call_channels` has checked that all agree


def _channel_delta_gradient(left: Tensor, right: Tensor, mask: MaskUse | None, dtype: torch.dtype) -> Tensor:
    found = (left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])).reshape(-1).to(dtype)
    return found if mask is None else mask.apply(found)
