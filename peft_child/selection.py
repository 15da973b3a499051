"""The exact global choice: a given number of the largest scores over all tensors together.

Non-negative float32 numbers sort like their bit patterns read as integers. One histogram over the upper half of the
bits finds the bin of the threshold, a second one over the lower half of that bin the threshold itself: no sorting, no
joining of the tensors, and memory for one piece of one tensor at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


_BINS = 1 << 16
_INFINITY = 0x7F80_0000  # bit pattern; larger ones are NaN, negative ones negative numbers
_PIECE = 1 << 22  # scores looked at together, to bound the extra memory


class Cutoff(NamedTuple):
    """What separates the largest scores of several tensors from the others.

    Attributes:
        threshold: Bit pattern of the smallest score that is chosen; all larger ones are chosen.
        ties: How many scores equal to it are chosen, from here on in the order of the tensors.
    """

    threshold: int
    ties: int


def select_largest(scores: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Choose the `size` largest scores of all tensors together (Child-Tuning_D; Xu et al., 2021).

    Ties at the threshold go to the earlier tensor in `scores`, then to the smaller flat index, so that exactly `size`
    entries are chosen and equal scores give equal choices.

    Args:
        scores: Non-negative finite float32 scores by name, any shape, on any device.
        size: Number of entries to choose, from 1 to the number of scores.

    Returns:
        Strictly increasing flat row-major indices by name, int64, on the device of the scores; the lengths sum to
        `size`, and a tensor without a chosen entry has an empty index.

    Raises:
        ValueError: If `size` is out of range, or scores are negative, NaN, infinite or of another dtype.
    """
    cutoff = find_cutoff(scores, size)
    chosen = {}
    for name, score in scores.items():
        chosen[name], cutoff = choose(score, cutoff)
    return chosen


def find_cutoff(
    scores: Mapping[str, Tensor], size: int, add_up: Callable[[Tensor], None] = lambda counts: None
) -> Cutoff:
    """Find what separates the `size` largest scores of all tensors together from the others.

    Args:
        scores: As in `select_largest`. They are asked for twice, one at a time, so they may be computed lazily.
        size: Number of entries to choose, from 1 to the number of scores.
        add_up: Adds what other processes have counted to int64 counts, in place, if each has a part of the scores.

    Returns:
        The cutoff for the first of the tensors.

    Raises:
        ValueError: As `select_largest`.
    """

    def upper_halves() -> Iterator[Tensor]:
        for name, score in scores.items():
            check_scores(name, score)
            yield from (bits >> 16 for bits in _pieces(score))

    counts = _histogram(upper_halves())
    add_up(counts)
    total = int(counts.sum())
    if not 1 <= size <= total:
        raise ValueError(f"size must be from 1 to {total}, the number of scores, got {size}.")
    upper, left = _bin_of(size, counts)
    inside = (bits[bits >> 16 == upper] & 0xFFFF for score in scores.values() for bits in _pieces(score))
    counts = _histogram(inside)
    add_up(counts)
    lower, left = _bin_of(left, counts)
    return Cutoff(upper << 16 | lower, left)


def choose(score: Tensor, cutoff: Cutoff) -> tuple[Tensor, Cutoff]:
    """Choose the scores of one tensor that a cutoff lets pass.

    Args:
        score: As in `select_largest`, of any shape.
        cutoff: That of this tensor.

    Returns:
        Strictly increasing flat indices, int64, shape `(k,)`, and the cutoff for the next tensor.
    """
    bits, left = _bits(score), cutoff.ties
    above = bits > cutoff.threshold
    if left:
        equal = (bits == cutoff.threshold).nonzero().view(-1)[:left]
        above[equal] = True
        left -= equal.numel()
    return above.nonzero().view(-1), cutoff._replace(ties=left)


def count_ties(score: Tensor, cutoff: Cutoff) -> int:
    """How many scores of one tensor are equal to the threshold."""
    return int((_bits(score) == cutoff.threshold).sum())


def _histogram(digits: Iterator[Tensor]) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for digit in digits:
        counts += torch.bincount(digit, minlength=_BINS).cpu()
    return counts


def _bin_of(rank: int, counts: Tensor) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest digit, and its rank among the digits of that bin."""
    at_least = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(at_least, rank))
    above = int(at_least[position - 1]) if position else 0
    return _BINS - 1 - position, rank - above


def _bits(score: Tensor) -> Tensor:
    return score.detach().reshape(-1).view(torch.int32)


def _pieces(score: Tensor) -> Iterator[Tensor]:
    return iter(_bits(score).split(_PIECE))


def check_scores(name: str, score: Tensor) -> None:
    """Raise a `ValueError` if scores are negative, NaN, infinite, or not float32."""
    if score.dtype != torch.float32:
        raise ValueError(f"Scores must be float32, those of '{name}' are {score.dtype}.")
    if not score.numel():
        return
    low, high = _bits(score).aminmax()
    if low < 0 or high >= _INFINITY:
        raise ValueError(f"Scores must be finite and not negative; those of '{name}' hold another value.")


def apportion(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` among tensors in proportion to their sizes, by the largest remainder.

    Args:
        sizes: Number of entries by name.
        total: Number to divide, at most the sum of the sizes.

    Returns:
        A count by name, at most the size, summing to `total`; equal remainders favour the earlier name.
    """
    numel = sum(sizes.values())
    counts = {name: size * total // numel for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: sizes[name] * total % numel, reverse=True)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def draw_random(name: str, numel: int, count: int, seed: int) -> Tensor:
    """Draw a random child network of one tensor, the same in every process and on every device.

    Args:
        name: Name of the tensor, so that tensors of equal shape have different child networks.
        numel: Number of entries of the tensor.
        count: Number of entries to draw, from 0 to `numel`.
        seed: Non-negative seed.

    Returns:
        Strictly increasing flat indices, int64, shape `(count,)`, on the CPU.
    """
    if count in (0, numel):
        return torch.arange(count)
    return select_largest({name: torch.rand(numel, generator=seeded(name, seed))}, count)[name]


def seeded(name: str, seed: int) -> torch.Generator:
    """A random generator of its own for every name and seed, the same in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
