"""Exchanges between the ranks that train one model (torch.distributed), which also carry errors.

A rank that fails still takes part in the next exchange: it sends its error, and all ranks raise it. So no rank waits
forever for another. Without torch.distributed, or in one process, nothing is exchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed


T = TypeVar("T")
PATIENCE = timedelta(minutes=2)  # ranks that do the same come at almost the same time
_NONE = object()  # marks the end of the items, which may be None


class _Failure(NamedTuple):
    """Kind and message of an exception, which cannot always be pickled itself."""

    kind: type[ValueError | RuntimeError]
    message: str


class _FailedElsewhereError(Exception):
    """Another rank failed in the middle of the work, and this one has received its error in an exchange."""

    def __init__(self, answers: list[Any]) -> None:
        super().__init__()
        self.answers = answers


def world_size() -> int:
    """Number of processes in the default group; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 without torch.distributed."""
    return distributed.get_rank() if world_size() > 1 else 0


def gathered(value: T) -> list[T]:
    """The picklable values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_every_rank(work: Callable[[], T]) -> T:
    """Do this rank's part of the work, and raise the error of any rank on every rank.

    Args:
        work: The part. It must exchange nothing but through `in_step`.

    Returns:
        What `work` returns here.

    Raises:
        Exception: In one process, whatever `work` raises.
        ValueError: If `work` raised one on any rank; raised on every rank.
        RuntimeError: If `work` raised another exception on any rank; raised on every rank.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except _FailedElsewhereError as failed:  # the rank that failed waits for no further exchange
        _raise_first_failure(failed.answers)
    except Exception as caught:  # whatever it is, the others must not wait
        error = caught
    _raise_first_failure(gathered(None if error is None else _failure(error)), error)
    return result  # type: ignore[return-value]


def in_step(items: Iterable[T], has_enough: Callable[[int], bool], shared: bool) -> Iterator[tuple[int, T]]:
    """Iterate over this rank's items in step with the other ranks, so that all know at once if one fails.

    Some dataloaders communicate between ranks themselves. So ranks that have enough keep iterating until all are done.

    Args:
        items: The items of this rank; ranks may have different numbers of them.
        has_enough: Whether no more items of a given rank are needed.
        shared: Whether every rank gets the items of all ranks, in rank order; they have to be picklable then.

    Yields:
        The rank that an item belongs to, and the item.

    Raises:
        _FailedElsewhereError: If another rank failed; `on_every_rank`, which has to enclose the loop, handles it.
    """
    iterator = iter(items)
    is_over = False
    while True:
        is_done = is_over or has_enough(rank())
        if all(_answers(is_done)):
            return
        item = _NONE if is_over else next(iterator, _NONE)
        is_over = item is _NONE
        mine: list[Any] = [] if is_over or is_done else [(rank(), item)]
        if shared:
            for theirs in _answers(mine):
                yield from theirs
        else:
            yield from mine


def _answers(value: T) -> list[T]:
    """The values of all ranks, if none has failed."""
    answers = gathered(value)
    if any(isinstance(answer, _Failure) for answer in answers):
        raise _FailedElsewhereError(answers)
    return answers


def _raise_first_failure(answers: list[Any], error: Exception | None = None) -> None:
    first = next((answer for answer in answers if isinstance(answer, _Failure)), None)
    if first is not None:
        failed = ", ".join(str(number) for number, answer in enumerate(answers) if answer == first)
        raise first.kind(f"{first.message} (rank {failed} of {world_size()})") from error


def _failure(error: Exception) -> _Failure:
    if isinstance(error, ValueError):
        return _Failure(ValueError, str(error))
    if isinstance(error, RuntimeError):
        return _Failure(RuntimeError, str(error))
    return _Failure(RuntimeError, f"{type(error).__name__}: {error}")


def check_all_come(message: str, patience: timedelta = PATIENCE) -> None:
    """Raise a `RuntimeError` with the message if not every rank calls this; gathering would wait for the others."""
    if world_size() == 1:
        return
    device = "cpu" if "gloo" in distributed.get_backend() else torch.accelerator.current_accelerator()
    try:
        distributed.all_reduce(torch.zeros(1, device=device), async_op=True).wait(patience)
    except RuntimeError as error:
        raise RuntimeError(message) from error


def check_equal(settings: Mapping[str, object]) -> None:
    """Raise a `ValueError` on every rank if settings, by their names for users, differ in `repr` between ranks."""
    shown = gathered({name: repr(value) for name, value in settings.items()})
    for name in settings:
        values = [each.get(name) for each in shown]
        if len(set(values)) > 1:
            raise ValueError(
                f"Every process must have the same {name}; got "
                + ", ".join(f"{value} on rank {number}" for number, value in enumerate(values))
                + "."
            )


def add_over_ranks(tensor: Tensor) -> None:
    """Sum a contiguous tensor over all ranks, in place; it has the same shape and dtype on every rank."""
    if world_size() > 1:
        distributed.all_reduce(tensor)


def check_can_add(device: torch.device) -> None:
    """Raise a `ValueError` if the process group cannot sum tensors on this device."""
    if device.type == "cpu" and world_size() > 1 and distributed.get_backend() == "nccl":
        raise ValueError(
            "The process group's backend is nccl, which takes tensors on GPUs only: move the model to its GPU before "
            "its child network is chosen, or initialise torch.distributed with 'cpu:gloo,cuda:nccl'."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether every rank has a shard of the tensor (a DTensor, which torch may have been built without)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded; then every rank has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """The tensor, or this rank's shard if it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def alike(tensor: Tensor, example: Tensor | None) -> Tensor:
    """The tensor, sharded if the example is; then every rank has to call this with the same tensor."""
    if example is None or not is_sharded(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)  # type: ignore[attr-defined]


def check_has_values(what: str, tensor: Tensor) -> None:
    """Raise a `RuntimeError` if a tensor is on the meta device, as those of an offloaded model are."""
    if tensor.is_meta:
        raise RuntimeError(
            f"{what} is offloaded (on the meta device). Child-Tuning supports that for the weights of linear layers "
            "alone: target no others, choose a device_map that keeps these modules on a device, load the base model "
            "in 4 or 8 bits, or shard it (FSDP2)."
        )


def check_whole(name: str, tensor: Tensor, way_out: str) -> None:
    """Raise a `ValueError` if a tensor is sharded, saying what to do."""
    if is_sharded(tensor):
        raise ValueError(f"'{name}' is sharded over processes (a DTensor): {way_out}.")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of named tensors that differs if a name, shape, dtype or bit differs."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # As bytes, since numpy has no bfloat16.
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
