"""How large the deltas of an adapter are: a histogram over all of them, and a sum for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.tensors.delta import Progress, SparseDelta, silent


STEPS = 10  # bins in every factor of ten
FIRST = -3240  # 10 ** -324 is 0 in float64
# Bin k holds the sizes from EDGES[k] up to, but not including, EDGES[k + 1]; every float64 is in one of them.
EDGES = [10.0 ** (step / STEPS) for step in range(FIRST, 3083)]
_COUNTED_TOGETHER = 1 << 20  # deltas, to bound the extra memory


class DeltaCounts(NamedTuple):
    """How large deltas are.

    Attributes:
        sums: Sum of the absolute deltas by name of the parameter, added in float64.
        decreases: Number of deltas below zero, by number of the bin in `EDGES` that holds their absolute value.
        increases: Number of deltas above zero, likewise.
        zeros: Number of deltas that are zero.
    """

    sums: dict[str, float]
    decreases: dict[int, int]
    increases: dict[int, int]
    zeros: int


def count_deltas(deltas: Mapping[str, SparseDelta], progress: Progress = silent) -> DeltaCounts:
    """Count deltas by size and sign; each tensor is read once, and let go before the next one is read.

    The bins do not depend on the deltas: ten of them in every factor of ten.

    Args:
        deltas: Finite deltas of any floating dtype by name of the parameter.
        progress: Wraps the loop over the names.
    """
    counts = torch.zeros(3, len(EDGES), dtype=torch.int64)  # below zero, zero, above zero
    edges = torch.tensor(EDGES, dtype=torch.float64)
    sums = {name: _count(deltas[name].values, edges, counts) for name in progress(list(deltas), "Counting")}
    below, zero, above = counts
    return DeltaCounts(sums, _by_bin(below), _by_bin(above), int(zero.sum()))


def _count(values: Tensor, edges: Tensor, counts: Tensor) -> float:
    """Add to the counts of every sign and bin, shape `(3, bins)`; the sum of the absolute values."""
    total = 0.0
    for piece in values.split(_COUNTED_TOGETHER):
        exact = piece.double()
        bins = torch.bucketize(exact.abs(), edges, right=True) - 1
        cells = bins + (exact.sign().long() + 1) * len(edges)
        counts += cells.bincount(minlength=counts.numel()).view_as(counts)
        total += float(exact.abs().sum())
    return total


def _by_bin(counts: Tensor) -> dict[int, int]:
    return {bin_: int(counts[bin_]) for bin_ in counts.nonzero().flatten().tolist()}
