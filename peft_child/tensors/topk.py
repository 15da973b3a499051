"""The exact global choice: a given number of the largest scores over all tensors together.

Non-negative float32 numbers sort like their bit patterns read as integers. One histogram over the upper half of the
bits finds the bin of the threshold, and a second one over the lower half of the bits in that bin finds the threshold
itself: without sorting, concatenating tensors, or more memory than for one piece of one tensor. Where all scores are
at hand, a sample brackets the threshold, and only the scores inside the bracket go through the histograms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BINS = 1 << 16
_INFINITY = 0x7F80_0000  # bit pattern; larger ones are NaN, negative ones negative numbers
_PIECE = 1 << 18  # scores processed together: few enough for the cache, and a bound on the extra memory


class Cutoff(NamedTuple):
    """What separates the largest scores of several tensors from the others.

    Attributes:
        threshold: The smallest score that is chosen; all larger ones are chosen.
        ties: How many scores equal to it are still to be chosen, in this tensor and the later ones.
    """

    threshold: float
    ties: int


def select_largest(scores: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Choose the `size` largest scores of all tensors together (Child-Tuning_D; Xu et al., 2021).

    Ties at the threshold go to the earlier tensor in `scores`, then to the smaller flat index, so that exactly `size`
    entries are chosen and equal scores give equal choices. It takes little memory besides the result: 50 MB for a
    billion scores, and as much as the result of the largest tensor.

    Args:
        scores: Non-negative finite scores by name, float32, bfloat16 or float16, any shape, on any device.
        size: Number of entries to choose, from 1 to the number of scores.

    Returns:
        Strictly increasing flat row-major indices by name, int64, on the device of the scores; the lengths sum to
        `size`, and a tensor without a chosen entry has an empty index.

    Raises:
        ValueError: If `size` is out of range, or scores are negative, NaN, infinite or of another dtype.
    """
    for name, score in scores.items():
        check_scores(name, score)
    _check_size(size, sum(score.numel() for score in scores.values()))
    found, left = _candidates(scores, size, *_guess(scores, size))
    # With no room, or room for more than the unsure ones, the threshold is outside the bracket.
    if not 1 <= left <= sum(candidates.scores.numel() for candidates in found.values()):
        threshold = find_cutoff(scores, size).threshold
        found, left = _candidates(scores, size, threshold, threshold)
    cutoff = find_cutoff({name: candidates.scores for name, candidates in found.items()}, left)
    chosen = {}
    for name in scores:
        chosen[name], cutoff = found.pop(name).choose(cutoff)  # popped to free its memory
    return chosen


def find_cutoff(
    scores: Mapping[str, Tensor], size: int, add_up: Callable[[Tensor], None] = lambda counts: None
) -> Cutoff:
    """Find what separates the `size` largest scores of all tensors together from the others.

    Args:
        scores: As in `select_largest`. Each is read twice, one tensor at a time, so they may be computed lazily.
        size: Number of entries to choose, from 1 to the number of scores.
        add_up: If each process has a part of the scores, adds the int64 counts of the other processes in place.

    Returns:
        The cutoff for the first of the tensors.

    Raises:
        ValueError: As `select_largest`.
    """

    def upper_halves() -> Iterator[Tensor]:
        for name, score in scores.items():
            check_scores(name, score)
            yield from (_bits(piece) >> 16 for piece in _pieces(score))

    def lower_halves() -> Iterator[Tensor]:
        first, last = _score_of(upper << 16), _score_of(upper << 16 | 0xFFFF)
        for score in scores.values():
            for piece in _pieces(score):
                above = piece[_at_least(piece, first)]
                yield _bits(above[above <= last]) & 0xFFFF

    counts = _histogram(upper_halves())
    add_up(counts)
    _check_size(size, int(counts.sum()))
    upper, left = _bin_of(size, counts)
    counts = _histogram(lower_halves())
    add_up(counts)
    lower, left = _bin_of(left, counts)
    return Cutoff(_score_of(upper << 16 | lower), left)


def choose(score: Tensor, cutoff: Cutoff) -> tuple[Tensor, Cutoff]:
    """Choose the scores of one tensor that pass a cutoff.

    Args:
        score: As in `select_largest`.
        cutoff: The cutoff for this tensor.

    Returns:
        Strictly increasing flat indices, int64, shape `(k,)`, and the cutoff for the next tensor.
    """
    return _Candidates.of(score, cutoff.threshold, cutoff.threshold).choose(cutoff)


def count_ties(score: Tensor, cutoff: Cutoff) -> int:
    """How many scores of one tensor are equal to the threshold."""
    return sum(int((piece == cutoff.threshold).sum()) for piece in _pieces(score))


class _Candidates(NamedTuple):
    """Scores of one tensor that may be among the largest.

    Attributes:
        positions: Flat indices of the candidates, increasing, int64.
        unsure: Increasing indices into `positions`, int64, of those that the cutoff decides on; the others are in.
        scores: Scores of the unsure candidates, float32.
    """

    positions: Tensor
    unsure: Tensor
    scores: Tensor

    @classmethod
    def of(cls, score: Tensor, low: float, high: float) -> _Candidates:
        """The scores from `low` on; those up to `high` are unsure."""
        parts: list[_Candidates] = []
        start = count = 0
        for piece in _pieces(score):
            positions = _at_least(piece, low)
            values = piece[positions]
            unsure = _where(values <= high)
            parts.append(cls(positions + start, unsure + count, values[unsure]))
            start, count = start + piece.numel(), count + positions.numel()
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def choose(self, cutoff: Cutoff) -> tuple[Tensor, Cutoff]:
        """The positions that pass a cutoff, and the cutoff for the next tensor."""
        ties = _where(self.scores == cutoff.threshold)
        kept = torch.ones(self.positions.numel(), dtype=torch.bool, device=self.positions.device)
        kept[self.unsure] = self.scores > cutoff.threshold
        kept[self.unsure[ties[: cutoff.ties]]] = True
        return self.positions[_where(kept)], cutoff._replace(ties=max(0, cutoff.ties - ties.numel()))


def _candidates(
    scores: Mapping[str, Tensor], size: int, low: float, high: float
) -> tuple[dict[str, _Candidates], int]:
    """The candidates of every tensor, and how many of the unsure ones there is room for."""
    found = {name: _Candidates.of(score, low, high) for name, score in scores.items()}
    return found, size - sum(each.positions.numel() - each.unsure.numel() for each in found.values())


def _guess(scores: Mapping[str, Tensor], size: int) -> tuple[float, float]:
    """Two scores that bracket the threshold, unless the sample is off by more than six standard deviations."""
    total = sum(score.numel() for score in scores.values())
    # With a sample of n ** (2 / 3) scores about as many lie inside the bracket, which makes the sum of both smallest.
    step = max(1, round(total ** (1 / 3)))
    sample = torch.cat([score.detach().reshape(-1)[::step].float().cpu() for score in scores.values()])
    ordered, share = sample.sort(descending=True).values, size / total
    rank, spread = share * len(sample), 6 * math.sqrt(len(sample) * share * (1 - share)) + 2
    return float(ordered[min(int(rank + spread), len(sample) - 1)]), float(ordered[max(int(rank - spread), 0)])


def _at_least(piece: Tensor, score: float) -> Tensor:
    """Positions of the scores that are not smaller."""
    if piece.is_cpu:  # numpy compares and looks for positions three times as fast as torch
        return torch.from_numpy(np.flatnonzero(piece.numpy() >= np.float32(score)))
    return _where(piece >= score)


def _where(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.nonzero().view(-1)


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


def _bits(piece: Tensor) -> Tensor:
    return piece.view(torch.int32)


def _score_of(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _pieces(score: Tensor) -> Iterator[Tensor]:
    """A tensor as flat float32 pieces."""
    return (piece.float() for piece in score.detach().reshape(-1).split(_PIECE))


def check_scores(name: str, score: Tensor) -> None:
    """Raise a `ValueError` if scores are negative, NaN, infinite, or not of one of `SCORE_DTYPES`."""
    if score.dtype not in SCORE_DTYPES:
        raise ValueError(f"Scores must be float32, bfloat16 or float16, those of '{name}' are {score.dtype}.")
    for piece in _pieces(score) if score.numel() else ():  # an empty piece has no minimum
        low, high = _bits(piece).aminmax()
        if low < 0 or high >= _INFINITY:
            raise ValueError(f"Scores must be finite and not negative; those of '{name}' hold another value.")


def _check_size(size: int, total: int) -> None:
    if not 1 <= size <= total:
        raise ValueError(f"size must be from 1 to {total}, the number of scores, got {size}.")


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
    # The sort is stable, also in reverse, so equal remainders stay in the order of names.
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
    if count in (0, numel):  # no choice to make, and `select_largest` takes no 0
        return torch.arange(count)
    # The largest of random numbers come sorted, and need less memory than a permutation.
    return select_largest({name: torch.rand(numel, generator=seeded(name, seed))}, count)[name]


def seeded(name: str, seed: int) -> torch.Generator:
    """A random generator for a name and a seed, the same in every process."""
    # Python's own hash of a string differs between processes.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
