"""Where a worker of vLLM keeps the entries of a checkpoint's tensors, whatever it has fused, sharded or left out.

Every model of vLLM knows how to load a checkpoint: it takes parts of a tensor and copies them into parts of its own
weights. Here it is given tensors without memory, and what it would copy where is noted in place of the copies.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class UnplaceableError(ValueError):
    """A model does more with a tensor of the checkpoint than to copy parts of it."""


class Piece(NamedTuple):
    """A part of a tensor, and where a worker keeps it.

    Attributes:
        held: The worker's own entries, a view of one of its weights.
        shape: Shape of the tensor in the checkpoint.
        start: First index of the part in each dimension of the tensor.
        stop: Index after the last one, in each dimension.
        dims: Dimensions of the tensor in the order of those of `held`.
    """

    held: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the part is all of the tensor."""
        return self.held.numel() == math.prod(self.shape)

    def here(self, indices: Tensor) -> tuple[Tensor | slice, tuple[Tensor, ...]]:
        """Which of some flat positions in the tensor are in this part, and where they are in `held.view(shape)`."""
        if self.dims == tuple(range(len(self.shape))) and self.is_whole and self.held.is_contiguous():
            return slice(None), (indices,)
        coordinates = torch.unravel_index(indices.long(), self.shape)
        inside = torch.ones_like(indices, dtype=torch.bool)
        for each, start, stop in zip(coordinates, self.start, self.stop, strict=True):
            inside &= (each >= start) & (each < stop)
        return inside, tuple(coordinates[dim][inside] - self.start[dim] for dim in self.dims)


class Placement:
    """Where a worker keeps one tensor of the checkpoint: parts of it, all of it, more than once, or nothing."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def differ(self, indices: Tensor, values: Tensor) -> Tensor:
        """Where the worker holds other values than given: a mask, bool, of the shape of `indices`."""
        differ = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
        for piece in self.pieces:
            here, places = piece.here(indices)
            held = _indexable(piece.held, places)[places]
            differ[here] |= held != values[here].to(held.dtype)
        return differ

    def write(self, indices: Tensor, values: Tensor) -> None:
        """Write values at flat positions of the tensor, as far as they are here."""
        for piece in self.pieces:
            here, places = piece.here(indices)
            _indexable(piece.held, places)[places] = values[here].to(piece.held.dtype)


def _indexable(held: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    return held.view(-1) if len(places) == 1 else held


def place(model: nn.Module, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Placement]:
    """Find where a model keeps tensors of its checkpoint.

    Args:
        model: A model of vLLM.
        tensors: Shapes and dtypes of the tensors, by name in the checkpoint.

    Raises:
        UnplaceableError: If the model does not copy parts of a tensor, but computes weights from it, or has changed
            how it keeps them since it was loaded.
    """
    found = {name: Placement() for name in tensors}
    for dtype in {dtype for _, dtype in tensors.values()}:
        shapes = {name: shape for name, (shape, own) in tensors.items() if own == dtype}
        _place_alike(model, shapes, dtype, found)
    return found


def _place_alike(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, found: Mapping[str, Placement]
) -> None:
    """Place tensors of one dtype."""
    # Views of one tensor, which are told apart by where they begin. The first begins so late that no view of a tensor
    # that was computed from one of them, which has a memory of its own, can be taken for one of them.
    names = list(shapes)
    sizes = [math.prod(shape) for shape in shapes.values()]
    starts = list(accumulate(sizes, initial=sum(sizes)))
    everything = torch.empty(starts[-1], dtype=dtype, device="meta")
    views = {
        name: everything[start : start + size].view(shapes[name])
        for name, start, size in zip(names, starts, sizes, strict=False)
    }

    def note(held: Tensor, given: Tensor, non_blocking: bool = False) -> Tensor:
        begin = int(given.storage_offset())
        number = bisect_right(starts, begin) - 1
        piece = None
        if given.is_meta and given.dtype == dtype and 0 <= number < len(names):
            piece = _piece(held, given, views[names[number]], begin - starts[number])
        if piece is None:
            raise UnplaceableError(f"A weight of the shape {tuple(held.shape)} is no part of one in the checkpoint.")
        found[names[number]].pieces.append(piece)
        return held

    try:
        with _kept_weights(model), _replaced_copies(note):
            cast(Any, model).load_weights(list(views.items()))
    except UnplaceableError:
        raise
    except Exception as error:  # of any kind, where a model computes with what it should only copy
        raise UnplaceableError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _kept_weights(model: nn.Module) -> Iterator[None]:
    """Put back what a model's loader replaces, such as a bias that it registers anew; raises an error if it does."""
    before = {(id(module), name): (module, weight, weight.data) for module, name, weight in _weights(model)}
    try:
        yield
    finally:
        after = {(id(module), name): (module, weight, weight.data) for module, name, weight in _weights(model)}
        replaced = [place for place in before.keys() | after.keys() if not _same(before.get(place), after.get(place))]
        for place in replaced:
            module, weight, data = before.get(place) or after[place]
            if place in before:
                weight.data = data
                setattr(module, place[1], weight)
            else:
                delattr(module, place[1])
    if replaced:
        raise UnplaceableError(f"The model replaces '{replaced[0][1]}' when it is loaded.")


def _same(before: tuple[nn.Module, Tensor, Tensor] | None, after: tuple[nn.Module, Tensor, Tensor] | None) -> bool:
    if before is None or after is None:
        return False
    return before[1] is after[1] and before[2].data_ptr() == after[2].data_ptr()


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters and buffers of every module."""
    for module in model.modules():
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        yield from ((module, name, weight) for name, weight in own)


def _piece(held: Tensor, given: Tensor, whole: Tensor, offset: int) -> Piece | None:
    """The piece that is copied, given as a view of the whole from an offset on; None if it is no block of it."""
    if held.shape != given.shape or not held.is_floating_point():
        return None
    start: list[int] = []
    for stride in whole.stride():
        start.append(offset // stride)
        offset %= stride
    by_stride = {stride: dim for dim, stride in enumerate(whole.stride()) if whole.shape[dim] > 1}
    stop = [first + 1 for first in start]
    dims = []
    for size, stride in zip(given.shape, given.stride(), strict=True):
        if size > 1:
            if stride not in by_stride:
                return None
            dim = by_stride[stride]
            stop[dim] = start[dim] + size
            dims.append(dim)
    if len(set(dims)) < len(dims) or any(end > size for end, size in zip(stop, whole.shape, strict=True)):
        return None
    flat = held.view([size for size in held.shape if size != 1])
    return Piece(flat, tuple(whole.shape), tuple(start), tuple(stop), tuple(dims))


@contextmanager
def _replaced_copies(copy: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model's loader call a function wherever it would copy into a weight."""
    original = Tensor.copy_
    Tensor.copy_ = copy  # type: ignore[method-assign]  # the way of vLLM's own sparse updates
    try:
        yield
    finally:
        Tensor.copy_ = original  # type: ignore[method-assign]
