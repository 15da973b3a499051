"""A linear layer with a child network of input channels, whose backward computes the gradients of those alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_child.tensors.channels import Channels
from peft_child.tensors.compose import Composition
from peft_child.tensors.quantised import is_quantised


def can_call_channels(module: nn.Module, weight: Composition | None) -> bool:
    """Whether `call_channels` computes what the module would: a linear layer without hooks, trained by channels."""
    if weight is None or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    if not torch.is_grad_enabled() or weight.base.requires_grad or is_quantised(weight.base):
        return False
    has_hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    is_simple = all(
        isinstance(child.indices, Channels) and child.indices.layout.inner == 1 and child.delta.requires_grad
        for child in weight.children
    )
    return is_simple and not has_hooks


def call_channels(x: Tensor, weight: Composition, bias: Tensor | None) -> Tensor:
    """`F.linear` with the composed weight; of the inputs it keeps those of the chosen channels for backward.

    With output gradients d, the gradient of some columns of the weight is `d.T @ x[..., columns]`: as much smaller a
    product as the child network is smaller than the weight.

    Args:
        x: Inputs, shape `(..., in)`.
        weight: The weight, shape `(out, in)`; its children are input channels.
        bias: Shape `(out,)`, or None.
    """
    y: Tensor = _ChannelLinear.apply(x, bias, weight, *(child.delta for child in weight.children))  # type: ignore[no-untyped-call]
    return y


class _ChannelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Composition, *deltas: Tensor) -> Tensor:
        y = F.linear(x, weight.tensor(), bias)
        ctx.weight, ctx.versions = weight, weight.versions()
        ctx.dtypes = [delta.dtype for delta in deltas]
        ctx.dtype = x.dtype
        chosen = [child.indices.chosen for child in weight.children if isinstance(child.indices, Channels)]
        # Autocast may have computed in a lower precision; what it did, backward does.
        ctx.save_for_backward(*(x.index_select(-1, numbers).to(y.dtype) for numbers in chosen))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight: Composition = ctx.weight
        needs_x, needs_bias, _, *needed = ctx.needs_input_grad
        of_x = of_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            if needs_x:
                of_x = (gradient @ weight.unchanged(ctx.versions).to(gradient.dtype)).to(ctx.dtype)
            if needs_bias:
                of_bias = flat.sum(0)
            found = [
                _of_delta(flat, kept, child.mask, dtype) if wanted else None
                for kept, child, dtype, wanted in zip(
                    ctx.saved_tensors, weight.children, ctx.dtypes, needed, strict=True
                )
            ]
        return of_x, of_bias, None, *found


def _of_delta(gradient: Tensor, kept: Tensor, mask: Any, dtype: torch.dtype) -> Tensor:
    found = (gradient.T @ kept.reshape(-1, kept.shape[-1])).reshape(-1).to(dtype)
    return found if mask is None else mask.apply(found)
