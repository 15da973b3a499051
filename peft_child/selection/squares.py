"""The score of an entry: the mean, over losses, of its squared gradient (diagonal empirical Fisher information).

Each gradient is squared and dropped as it arrives, so that memory holds the scores and one dense gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.distributed import add_over_ranks, gathered, is_sharded, on_every_rank, own_part, whole
from peft_child.tensors.quantised import is_quantised


@contextmanager
def squaring(
    parameters: Mapping[str, nn.Parameter],
    sums: Mapping[str, Tensor],
    max_norm: float | None = None,
    layouts: Mapping[str, ChannelLayout] | None = None,
    observe: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """For one backward pass, let parameters take gradients; square each as it arrives, add it to the sums and drop it.

    Args:
        parameters: Leaves by name. Their `.grad` must be None, and is None afterwards.
        sums: Where to add the squares, by name: float32, in the shape of the parameter, on any device.
        max_norm: Clip each parameter's gradient to this L2 norm before squaring, as the authors' code does.
        layouts: If given, add the sums over the entries of each input channel instead, shape `(number of channels,)`.
        observe: Called with the name and the squared norm (float64) of the gradient of every parameter that a loss
            reaches.

    Raises:
        ValueError: If a parameter is quantised, or a sharded one has a layout.
        RuntimeError: If a parameter's gradient is delivered in parts, which cannot be squared.
    """
    for name, parameter in parameters.items():
        _check_can_take_gradients(name, parameter, bool(layouts))
    arrived: set[str] = set()

    def add_square(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if name in arrived:
            raise arrived_in_parts(name)
        arrived.add(name)
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).float()
        if observe is not None:
            observe(name, gradient.square().sum(dtype=torch.float64))
        if max_norm is not None:
            gradient = gradient * clipping(whole(gradient.norm()), max_norm)  # the norm of all shards together
        if gradient.device == sums[name].device and not layouts:
            sums[name].addcmul_(gradient, gradient)  # needs no memory for the squares
        else:
            squares = gradient.square()
            sums[name].add_((layouts[name].sums(squares) if layouts else squares).to(sums[name].device))

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(_restore, parameter, parameter.requires_grad)
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(add_square, name)).remove)
        yield


def _check_can_take_gradients(name: str, parameter: nn.Parameter, by_channels: bool) -> None:
    if is_quantised(parameter):
        raise ValueError(
            f"'{name}' is quantised ({type(parameter).__name__}), and no gradient reaches it: estimate the Fisher "
            "information in the base model as it was before, and pass it as scores=."
        )
    if by_channels and is_sharded(parameter):
        raise ValueError(
            f"The input channels of '{name}' are scored by gradients, since there is no formula for its module, and "
            "these gradients are sharded: choose the child network before the model is sharded (fully_shard)."
        )


def _restore(parameter: nn.Parameter, required: bool) -> None:
    parameter.requires_grad_(required).grad = None


def clipping(norm: Tensor, max_norm: float) -> Tensor:
    """The factor by which `torch.nn.utils.clip_grad_norm_` scales a gradient of this norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def arrived_in_parts(name: str) -> RuntimeError:
    """The error for a gradient that comes more than once in a backward pass, so that it cannot be squared."""
    return RuntimeError(
        f"The gradient of '{name}' arrived in parts: with reentrant activation checkpointing, each segment that uses "
        "the weight delivers a part. Turn checkpointing off, or use use_reentrant=False, while scoring."
    )


def average(sums: Mapping[str, Tensor], losses: int, shared: bool) -> None:
    """Turn sums of squared gradients into their means over the losses of all ranks, in place.

    With one loss for each example, its negative log-likelihood at the true label, the mean is the empirical Fisher
    information of Xu et al. (2021): the mean over examples of `(d log p(y|x) / d w) ** 2`. A loss that is itself the
    mean over a batch of B examples gives `(1/B sum of gradients) ** 2` instead, which is not the same.

    Args:
        sums: By name, float32. The ranks exchange one tensor at a time.
        losses: Number of losses that this rank has squared.
        shared: Whether all ranks squared the gradients of the same losses, in shards (FSDP2).

    Raises:
        ValueError: If there is no loss on any rank, or a mean is not finite. Raised on every rank.
    """
    total = losses if shared else sum(gathered(losses))
    if not total:
        raise ValueError("The Fisher information needs an example with a label other than -100, got none.")
    for score in sums.values():
        if not shared:
            add_over_ranks(score)
        score.div_(total)
    on_every_rank(partial(_check_finite, sums))


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not torch.isfinite(own_part(score)).all():
            raise ValueError(f"The Fisher information of '{name}' is not finite: a gradient was NaN or too large.")
