"""How sure a mean of a few seeds is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean of paired differences, at the level of 95 %.

    With few pairs it is too narrow: for normal differences it holds the truth in 83 % of all cases with five pairs,
    and in 91 % with ten.

    Args:
        differences: One for each pair, here for each seed that both methods were trained with.
        seed: Of the resamples; the same differences in the same order have the same interval.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: If there are fewer than two differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"An interval needs at least two differences, got {len(values)}.")
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
