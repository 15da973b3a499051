"""Scores for controls: which child network is chosen if the usual order is turned round."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def turned_round(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores by which the smallest of some others are the largest."""
    largest = max(float(score.max()) for score in scores.values())
    # The float32 reciprocal keeps apart what `largest - score` would round to the same number.
    return {name: 1 / (score + 1e-20 * largest) for name, score in scores.items()}
