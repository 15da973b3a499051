"""Infers the loss reduction of a model by elimination: whether it averages over examples or tokens, or sums.

In the loss of a batch each example has a weight. With weight c its gradient is c times as large as that of its own
loss, so the weight must be known to correct it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


_IGNORED = -100  # the label of tokens that do not count
_TOLERANCES = {torch.float16: 0.03, torch.bfloat16: 0.1}  # of squared norms of gradients
_TOLERANCE = 1e-3
_CLEARLY = 4.0  # reductions whose error is more than that many times the smallest are ruled out
_PATIENCE = 8  # comparisons that may leave the weights unknown


class Comparison(NamedTuple):
    """Examples of a batch that were scored alone and together.

    Attributes:
        alone: Losses of the examples.
        together: Loss of the batch.
        norms_alone: Squared norms of the gradients of each example's own loss, float64, shape `(targets, examples)`.
        norms_together: Those of each example's share in the gradients of the batch loss.
        sizes: Number of entries of each target, shape `(targets, 1)`.
        dtype: The least precise dtype of the targets.
    """

    alone: Sequence[float]
    together: float
    norms_alone: Tensor
    norms_together: Tensor
    sizes: Tensor
    dtype: torch.dtype


class Reduction:
    """The reductions that are still possible; comparisons rule them out."""

    def __init__(self) -> None:
        self._possible = {"mean", "sum", "labels", "shifted labels"}
        self._undecided = 0

    def weights(self, batch: Any, size: int) -> list[float] | None:
        """The weights of the examples in a batch of `size`, all positive; None if they are not known."""
        found = self._candidates(batch, size)
        first = next(iter(found.values()), None)
        is_sure = first is not None and min(first) > 0 and all(weights == first for weights in found.values())
        return first if is_sure else None

    def most_telling(self, batch: Any, size: int) -> list[int]:
        """The two examples of a batch that tell the reductions apart best: with the fewest and the most labels."""
        counts = _counts(batch, size).get("labels", [0] * size)
        if len(set(counts)) == 1:
            return [0, 1]
        order = sorted(range(size), key=counts.__getitem__)
        return sorted((order[0], order[-1]))

    def learn(self, batch: Any, comparison: Comparison) -> str | None:
        """Rule out reductions that disagree with a comparison; returns why none can be found, or None."""
        size = len(comparison.alone)
        fits = {name: _error(weights, comparison) for name, weights in self._candidates(batch, size).items()}
        errors = {name: error for name, error in fits.items() if error is not None}
        if not errors:
            return (
                "the loss of a batch and its gradients are not the mean or sum of those of its examples: examples "
                "influence each other, or a targeted weight is used without calling its module"
            )
        best = min(errors.values())
        self._possible = {name for name, error in errors.items() if error <= _CLEARLY * best}
        if self.weights(batch, size) is None:
            # There is no clear winner: keep all that fit, and let further comparisons decide.
            self._possible = set(errors)
            self._undecided += 1
            if self._undecided == _PATIENCE:
                return "it could not be determined how the loss of a batch weighs its examples"
        return None

    def _candidates(self, batch: Any, size: int) -> dict[str, list[float]]:
        """Weights of the examples by each reduction that is still possible."""
        found = {"mean": [1 / size] * size, "sum": [1.0] * size}
        for name, counts in _counts(batch, size).items():
            if any(counts):
                found[name] = [count / sum(counts) for count in counts]
        return {name: weights for name, weights in found.items() if name in self._possible}


def _counts(batch: Any, size: int) -> dict[str, list[int]]:
    """Numbers of labels of each example: all of them, and those that a preceding token predicts."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim() or len(labels) != size:
        return {}
    counted = {"labels": labels.reshape(size, -1)}
    if labels.dim() == 2:
        counted["shifted labels"] = labels[:, 1:]
    return {name: (kept != _IGNORED).sum(1).tolist() for name, kept in counted.items()}


def _error(weights: list[float], comparison: Comparison) -> float | None:
    """How badly weights fit the norms of the examples' gradients; None if they do not fit at all."""
    tolerance = _TOLERANCES.get(comparison.dtype, _TOLERANCE)
    expected = sum(weight * loss for weight, loss in zip(weights, comparison.alone, strict=True))
    scale = sum(weight * abs(loss) for weight, loss in zip(weights, comparison.alone, strict=True))
    # Written as "not <=", so that NaN does not fit either.
    if not abs(expected - comparison.together) <= tolerance * scale or not min(weights) > 0:
        return None
    alone, sizes = comparison.norms_alone, comparison.sizes
    found = comparison.norms_together / alone.new_tensor(weights).square()
    total = alone.sum(0)
    noise = tolerance**2 * total * sizes / sizes.sum()  # gradients that are zero but for rounding errors
    if not ((found - alone).abs() <= tolerance * alone + noise).all():
        return None
    return float(((found.sum(0) - total).abs() / total.clamp(min=torch.finfo(total.dtype).tiny)).max())
