"""A sparse change of one tensor: how it is merged, extracted and compared.

Everything here works on plain tensors, one at a time, so that checkpoints of any size can be streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.partitioned import shape_of


Progress = Callable[[Sequence[str], str], Iterable[str]]  # wraps a loop over names, with a title

_PIECE = 1 << 20  # entries computed together, to bound the extra memory


def silent(names: Sequence[str], title: str) -> Iterable[str]:
    """No progress bar."""
    return names


class ChildSize(NamedTuple):
    """How large the child network of a tensor is.

    Attributes:
        numel: Entries of the tensor.
        chosen: Entries in the child network.
        index_bytes: Bytes of its index block.
    """

    numel: int
    chosen: int
    index_bytes: int

    @property
    def density(self) -> float:
        """Share of the entries that are in the child network."""
        return self.chosen / max(1, self.numel)


def total_size(sizes: Iterable[ChildSize]) -> ChildSize:
    """The size of the child networks of several tensors together."""
    return ChildSize(*map(sum, zip(ChildSize(0, 0, 0), *sizes, strict=True)))  # zeros, for no sizes


class SparseDelta(NamedTuple):
    """The change of some entries of a tensor.

    Attributes:
        shape: Shape of the tensor.
        indices: Flat row-major positions, int64, shape `(k,)`, strictly increasing.
        values: Changes to add there, floating point, shape `(k,)`; an entry with change 0 is in the child network too.
        fingerprint: Of the base values at the positions, 32 bits; 0 if unknown.
        layout: How channels lie in the tensor, if the child network consists of whole input channels; else None.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    fingerprint: int = 0
    layout: ChannelLayout | None = None

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


class Overlap(NamedTuple):
    """How much two child networks in the same tensors share.

    Attributes:
        shared: Entries in both.
        first: Entries of the first one.
        second: Entries of the second one.
        numel: Entries of all the tensors.
    """

    shared: int
    first: int
    second: int
    numel: int

    @property
    def jaccard(self) -> float:
        """Shared entries over the entries in either; 1.0 for equal child networks."""
        return self.shared / max(1, self.first + self.second - self.shared)

    @property
    def over_chance(self) -> float:
        """Shared entries over what two random child networks of these sizes share on average."""
        return self.shared * self.numel / max(1, self.first * self.second)

    def __add__(self, other: object) -> Overlap:
        """The overlap in several tensors together."""
        if not isinstance(other, Overlap):
            return NotImplemented
        return Overlap(*(a + b for a, b in zip(self, other, strict=True)))


def check_share(name: str, share: object) -> None:
    """Raise a `ValueError` if a share is not a number in (0, 1]; `name` is the user's name for it."""
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:  # type: ignore[operator]  # NaN as well
        raise ValueError(f"{name} must be a number in (0, 1], got {share!r}.")


def fresh_delta(
    tensor: Tensor, indices: Tensor, init_weights: bool = True, layout: ChannelLayout | None = None
) -> SparseDelta:
    """A float32 delta to be trained: zeros, or small random values if `init_weights` is False."""
    # 0.02 is the usual standard deviation of new weights.
    values = torch.zeros(indices.numel()) if init_weights else torch.randn(indices.numel()) * 0.02
    return SparseDelta(tuple(shape_of(tensor)), indices, values, layout=layout)


def rounded_sum(base: Tensor, change: Tensor) -> Tensor:
    """Add a change to base values in at least float32, and round once: so merged and unmerged outputs are bit-equal.

    Args:
        base: Base values, any floating dtype and shape.
        change: The change, any floating dtype, of the same shape.

    Returns:
        A new tensor, of the shape and dtype of `base`.
    """
    precise = torch.promote_types(torch.promote_types(base.dtype, torch.float32), change.dtype)
    return (base.to(precise) + change.to(precise)).to(base.dtype)


def extract_delta(base: Tensor, tuned: Tensor, indices: Tensor | None = None) -> SparseDelta:
    """The change between two tensors, at given positions or wherever they differ in a bit.

    At given positions the values are float32. Otherwise applying the delta to `base` gives `tuned` bit for bit, and
    the values are float32, or float64 if float32 cannot express every change.

    Args:
        base: The tensor before.
        tuned: The tensor after, of the same shape and dtype.
        indices: Strictly increasing flat positions, int64; by default all that differ.

    Returns:
        The delta, on the device of `base`.

    Raises:
        ValueError: If shapes or dtypes differ, or, without `indices`, float64 cannot express a change.
    """
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise ValueError(
            f"Tensors to compare must have the same shape and dtype, got {base.dtype} {tuple(base.shape)} and "
            f"{tuned.dtype} {tuple(tuned.shape)}."
        )
    lossless = indices is None
    before, after = base.reshape(-1), tuned.reshape(-1)
    if indices is None:
        indices = (as_bits(before) != as_bits(after)).nonzero().view(-1)
    for dtype in (torch.float32, torch.float64):
        values = torch.empty(indices.numel(), dtype=dtype, device=base.device)
        for part, found in zip(indices.split(_PIECE), values.split(_PIECE), strict=True):
            found.copy_(after[part].double() - before[part].double())  # float64 holds most differences exactly
            if lossless and (inexact := as_bits(rounded_sum(before[part], found)) != as_bits(after[part])).any():
                at = int(part[inexact][0])
                break
        else:  # every piece is exact
            return SparseDelta(tuple(base.shape), indices, values)
    raise ValueError(
        f"The change from {before[at].item()} to {after[at].item()} at position {at} cannot be expressed as a float64 "
        "difference."
    )


def count_different(base: Tensor, tuned: Tensor) -> int:
    """Number of entries in which two tensors of the same floating point dtype and shape differ in a bit."""
    return int((as_bits(base.reshape(-1)) != as_bits(tuned.reshape(-1))).sum())


def change(base: Tensor, tuned: Tensor) -> Tensor:
    """Absolute change of every entry as a float32 score."""
    scores = torch.empty(base.shape, device=base.device)
    precise = torch.promote_types(base.dtype, torch.float32)
    flat = (tensor.reshape(-1).split(_PIECE) for tensor in (base, tuned, scores))
    for before, after, score in zip(*flat, strict=True):
        score.copy_((after.to(precise) - before.to(precise)).abs())
        score[as_bits(before) == as_bits(after)] = 0  # equal infinities and NaN too, whose difference is NaN
    return scores


def overlap(first: SparseDelta, second: SparseDelta) -> Overlap:
    """Compare the child networks of two adapters in one tensor.

    Raises:
        ValueError: If the shapes differ.
    """
    check_shapes([first, second])
    shared = int(torch.isin(first.indices, second.indices, assume_unique=True).sum())
    return Overlap(shared, first.indices.numel(), second.indices.numel(), first.numel)


def as_bits(tensor: Tensor) -> Tensor:
    """Bit patterns as integers, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_shapes(deltas: Sequence[SparseDelta]) -> None:
    """Raise a `ValueError` if deltas of one tensor differ in shape."""
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"Deltas of one tensor must have the same shape, got {sorted(shapes)}.")


def places_in(known: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Where increasing positions hold some others, and which of these they hold, each of the shape of `indices`.

    Where they do not hold one, the place is any.
    """
    places = torch.searchsorted(known, indices).clamp_(max=len(known) - 1)
    return places, known[places] == indices
