"""Diagonal empirical Fisher information of named parameters.

The Fisher information of an entry is the mean of its squared gradient of the loss. Each gradient is squared and
dropped as it arrives, so that one dense gradient lives at a time next to the scores. Several processes each take
losses of their own, and share the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from peft_child.tensors.distributed import add_over_ranks, gathered, on_every_rank, own_part, whole


def mean_squares(
    parameters: Mapping[str, nn.Parameter],
    add_squares: Callable[[dict[str, Tensor]], int],
    same_losses: bool,
    make_room: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Average the squared gradients of losses, over all processes.

    With one loss for each example, its negative log-likelihood at the true label, this is the empirical Fisher
    information of Xu et al. (2021): the mean over examples of `(d log p(y|x) / d w) ** 2`. A loss that is itself the
    mean over a batch of B examples gives `(1/B sum of gradients) ** 2` instead, which is not the same.

    In several processes (torch.distributed) it is the mean over the losses of all of them, whose numbers may differ.
    The sums are exchanged tensor by tensor, in float32. An error on one rank is raised on every rank. If the
    parameters are sharded over the processes (FSDP2), which averages their gradients, all ranks have to take the same
    losses at the same time; the scores are sharded alike, and nothing is exchanged.

    Args:
        parameters: Parameters by name.
        add_squares: Adds the squared gradients of this rank's losses to zeros by name, and returns their number; see
            `squaring`.
        same_losses: Whether all ranks take the same losses.
        make_room: From name and parameter to float32 zeros in the shape of the parameter, on any device, to add its
            scores up in; `zeros_beside` for the device of the parameter.

    Returns:
        Scores by name, float32, in the shape of the parameter. A parameter that no loss reached has scores of zero.

    Raises:
        ValueError: If a score is not finite, or there is no loss on any rank.
    """
    scores = {name: make_room(name, parameter) for name, parameter in parameters.items()}
    count = on_every_rank(partial(add_squares, scores))
    total = count if same_losses else sum(gathered(count))
    if not total:
        raise ValueError("The Fisher information needs an example with a label other than -100, got none.")
    for score in scores.values():
        if not same_losses:
            add_over_ranks(score)
        score.div_(total)
    on_every_rank(partial(_check_finite, scores))
    return scores


def zeros_beside(name: str, parameter: Tensor) -> Tensor:
    """Room for scores on the device of the parameter, sharded as it is."""
    return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not torch.isfinite(own_part(score)).all():
            raise ValueError(f"The Fisher information of '{name}' is not finite: a gradient was NaN or too large.")


@contextmanager
def squaring(
    parameters: Mapping[str, nn.Parameter],
    sums: Mapping[str, Tensor],
    max_norm: float | None = None,
    observe: Callable[[str, Tensor], None] | None = None,
) -> Iterator[Callable[[Tensor], None]]:
    """For a while, square each gradient of the parameters as it arrives, add it to the sums and drop it.

    Args:
        parameters: Leaves that require gradients, by name. Their `.grad` must be None, and is None again afterwards.
        sums: Where to add the squares, by name.
        max_norm: Clip each parameter's gradient to this L2 norm before squaring, as the authors' code does.
        observe: Called with the name and the gradient in float32 of every parameter that a loss reaches.

    Yields:
        What runs backward from a loss.

    Raises:
        RuntimeError: If one backward pass delivers a parameter's gradient in parts, which cannot be squared.
    """
    arrived: set[str] = set()
    handles = [
        parameter.register_post_accumulate_grad_hook(
            _square_into(sums[name], partial(_arrive, arrived, name), max_norm, observe and partial(observe, name))
        )
        for name, parameter in parameters.items()
    ]

    def square(loss: Tensor) -> None:
        arrived.clear()
        loss.backward()

    try:
        yield square
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None


def arrived_in_parts(name: str) -> RuntimeError:
    """The error for a gradient that comes more than once in a backward pass, so that it cannot be squared."""
    return RuntimeError(
        f"The gradient of '{name}' arrived in parts: reentrant activation checkpointing uses it in several segments. "
        "Turn checkpointing off, or use use_reentrant=False, while scoring."
    )


def _arrive(arrived: set[str], name: str) -> None:
    if name in arrived:
        raise arrived_in_parts(name)
    arrived.add(name)


def _square_into(
    score: Tensor,
    arrive: Callable[[], None],
    max_norm: float | None,
    observe: Callable[[Tensor], None] | None,
) -> Callable[[Tensor], None]:
    def add_square(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        arrive()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.float()
        if max_norm is not None:  # the factor of torch.nn.utils.clip_grad_norm_
            gradient = gradient * (max_norm / (whole(gradient.norm()) + 1e-6)).clamp(max=1.0)
        if observe is not None:
            observe(gradient)
        if gradient.device == score.device:
            score.addcmul_(gradient, gradient)
        else:
            score.add_(gradient.square().to(score.device))

    return add_square
