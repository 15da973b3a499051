"""A sparse change of one tensor, and its algebra: apply, extract, combine, overlap.

Everything here works on plain tensors, one at a time, so that checkpoints of any size can be streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.compose import Child, Composition
from peft_child.lazy import Lazy
from peft_child.selection import seeded, select_largest


Progress = Callable[[Sequence[str], str], Iterable[str]]  # wraps a loop over names, with a title

_PIECE = 1 << 20  # entries computed together, to bound the extra memory


def silent(names: Sequence[str], title: str) -> Iterable[str]:
    """No progress bar."""
    return names


class SparseDelta(NamedTuple):
    """The change of some entries of a tensor.

    Attributes:
        shape: Shape of the tensor.
        indices: Flat row-major positions, int64, shape `(k,)`, strictly increasing.
        values: What is added there, floating point, shape `(k,)`; zeros belong to the child network as well.
        fingerprint: Of the base values at the positions, 32 bits; 0 if unknown.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    fingerprint: int = 0

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


class Overlap(NamedTuple):
    """How much two child networks in the same tensors share.

    Attributes:
        shared: Entries that both have chosen.
        first: Entries of the first one.
        second: Entries of the second one.
        numel: Entries of the tensors together.
    """

    shared: int
    first: int
    second: int
    numel: int

    @property
    def jaccard(self) -> float:
        """Shared entries over those that either has; 1.0 for equal child networks."""
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


def fresh_delta(tensor: Tensor, indices: Tensor, init_weights: bool = True) -> SparseDelta:
    """A delta to be trained, float32: of zeros, or of small random values if `init_weights` is False."""
    values = torch.zeros(indices.numel()) if init_weights else torch.randn(indices.numel()) * 0.02
    return SparseDelta(tuple(tensor.shape), indices, values)


def apply_delta(base: Tensor, delta: SparseDelta) -> Tensor:
    """Add a delta to a tensor, in at least float32 and rounded once: the very values that merging writes.

    Args:
        base: Tensor with as many entries as the delta's, any floating dtype.
        delta: The change.

    Returns:
        A new tensor, of the shape and dtype of `base`.

    Raises:
        ValueError: If the numbers of entries differ.
    """
    if base.numel() != delta.numel:
        raise ValueError(f"A delta of {delta.numel} entries cannot be added to a tensor of {base.numel()}.")
    with torch.no_grad():
        return Composition(base, (Child(delta.values, delta.indices),)).tensor()


def merged_values(base: Tensor, delta: SparseDelta) -> Tensor:
    """What `apply_delta` gives at the positions of the delta, shape `(k,)`, for the base values at these positions."""
    precise = torch.promote_types(torch.promote_types(base.dtype, torch.float32), delta.values.dtype)
    return (base.to(precise) + delta.values.to(precise)).to(base.dtype)


def extract_delta(base: Tensor, tuned: Tensor, indices: Tensor | None = None) -> SparseDelta:
    """The change between two tensors, at given positions or wherever they differ in a bit.

    Wherever they differ, applying the delta to `base` gives `tuned` bit for bit; the values are float32, or float64
    where float32 cannot express the change.

    Args:
        base: The tensor before.
        tuned: The tensor after, of the same shape and dtype.
        indices: Strictly increasing flat positions, int64; by default all that differ.

    Returns:
        The delta, on the device of `base`.

    Raises:
        ValueError: If shapes or dtypes differ, or a change cannot be expressed exactly where that is promised.
    """
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise ValueError(
            f"Tensors to compare must have the same shape and dtype, got {base.dtype} {tuple(base.shape)} and "
            f"{tuned.dtype} {tuple(tuned.shape)}."
        )
    lossless = indices is None
    before, after = base.reshape(-1), tuned.reshape(-1)
    if indices is None:
        indices = (_bits(before) != _bits(after)).nonzero().view(-1)
    for dtype in (torch.float32, torch.float64):
        values = torch.empty(indices.numel(), dtype=dtype, device=base.device)
        for part, found in zip(indices.split(_PIECE), values.split(_PIECE), strict=True):
            inexact = _write_difference(before[part], after[part], found)
            if lossless and inexact.any():
                at = int(part[inexact][0])
                break
        else:
            return SparseDelta(tuple(base.shape), indices, values)
    raise ValueError(
        f"The change from {before[at].item()} to {after[at].item()} at position {at} cannot be expressed as a float64 "
        "difference."
    )


def _write_difference(before: Tensor, after: Tensor, values: Tensor) -> Tensor:
    """Write the change in the dtype of `values`; returns where adding it does not give the bits of `after`."""
    values.copy_(after.double() - before.double())
    precise = torch.promote_types(torch.promote_types(before.dtype, torch.float32), values.dtype)
    again = (before.to(precise) + values.to(precise)).to(before.dtype)
    return _bits(again) != _bits(after)


def count_different(base: Tensor, tuned: Tensor) -> int:
    """Number of entries that differ in a bit, of two tensors of the same floating point dtype and shape."""
    return int((_bits(base.reshape(-1)) != _bits(tuned.reshape(-1))).sum())


def change(base: Tensor, tuned: Tensor) -> Tensor:
    """Absolute change of every entry, float32, as scores to choose the largest changes by."""
    scores = torch.empty(base.shape, device=base.device)
    precise = torch.promote_types(base.dtype, torch.float32)
    flat = (tensor.reshape(-1).split(_PIECE) for tensor in (base, tuned, scores))
    for before, after, score in zip(*flat, strict=True):
        score.copy_((after.to(precise) - before.to(precise)).abs())
    return scores


COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITIES = ("total", "frequency")


def combine_deltas(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    combination_type: str = "linear",
    density: float = 1.0,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> SparseDelta:
    """Combine the deltas of several adapters in one tensor, on the union of their child networks.

    'linear' sums the weighted deltas. 'magnitude_prune' first keeps the share `density` of the largest of each;
    'dare_linear' keeps a random share and divides it by `density` (Yu et al., 2024). 'ties' and 'dare_ties' average,
    at each entry, the weighted deltas that have the sign of the majority (Yadav et al., 2023). One adapter with
    weight 1.0 and density 1.0 comes back as it was.

    Args:
        deltas: At least one, of the same shape.
        weights: One for each delta.
        combination_type: One of `COMBINATIONS`; PEFT's names.
        density: Share of each *delta* that is kept, in (0, 1]; not of the tensor, of which it may be a small part.
        majority_sign_method: 'total', the sign of the sum, or 'frequency', the sign that more deltas have.
        generator: For the random choices of DARE.

    Returns:
        The combined delta, float32 or wider.

    Raises:
        ValueError: If an argument is not as described.
    """
    if not deltas or len(deltas) != len(weights):
        raise ValueError(f"Every delta needs one weight, got {len(deltas)} deltas and {len(weights)} weights.")
    check_combination(combination_type, density, majority_sign_method)
    _check_shapes(deltas)
    if len(deltas) == 1 and weights[0] == density == 1:
        return deltas[0]
    kept = [_thin(delta, combination_type, density, generator) for delta in deltas]
    union = torch.cat([delta.indices for delta in kept]).unique()
    same = [delta.fingerprint for delta in kept if delta.indices.equal(union)]
    rows = []
    for delta, weight in zip(kept, weights, strict=True):
        values = delta.values.to(torch.promote_types(delta.values.dtype, torch.float32))
        row = torch.zeros(union.numel(), dtype=values.dtype, device=values.device)
        rows.append(row.index_copy_(0, torch.searchsorted(union, delta.indices), weight * values))
    if combination_type.endswith("ties"):
        combined = _agreeing_mean(torch.stack(rows), majority_sign_method)
    else:
        combined = rows[0]
        for row in rows[1:]:
            combined = combined + row
    return SparseDelta(deltas[0].shape, union, combined, same[0] if same else 0)


def combine_named(
    adapters: Sequence[Mapping[str, SparseDelta]],
    weights: Sequence[float],
    *,
    combination_type: str = "linear",
    density: float = 1.0,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> Lazy[SparseDelta]:
    """Combine the deltas of several adapters tensor by tensor, wherever one of them has a child; see `combine_deltas`.

    Args:
        adapters: Deltas by name of the tensor, of each adapter.
        weights: One for each adapter.
        combination_type: As in `combine_deltas`.
        density: As in `combine_deltas`.
        majority_sign_method: As in `combine_deltas`.
        seed: For the random choices of DARE, which also depend on the name of the tensor.

    Returns:
        The combined deltas by name, float32 or wider, each combined whenever it is asked for. Asking raises
        `ValueError` if tensors of one name differ in shape.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Every adapter needs one weight, got {len(adapters)} adapters and {len(weights)} weights.")
    check_combination(combination_type, density, majority_sign_method)

    def combined(name: str) -> SparseDelta:
        parts = [(deltas[name], weight) for deltas, weight in zip(adapters, weights, strict=True) if name in deltas]
        return combine_deltas(
            [delta for delta, _ in parts],
            [weight for _, weight in parts],
            combination_type=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
            generator=seeded(name, seed),
        )

    return Lazy(union_of_names(adapters), combined)


def union_of_names(adapters: Iterable[Mapping[str, SparseDelta]]) -> list[str]:
    """Names of the tensors in which one adapter or another has a child, in the order of their first appearance."""
    return list(dict.fromkeys(name for deltas in adapters for name in deltas))


def density_of(deltas: Mapping[str, SparseDelta], progress: Progress = silent) -> float:
    """Share of the entries of all tensors together that combined deltas change; asks for each of them once."""
    chosen = numel = 0
    for name in progress(list(deltas), "Combining"):
        delta = deltas[name]
        chosen, numel = chosen + delta.indices.numel(), numel + delta.numel
    return chosen / numel


def check_combination(combination_type: str, density: float, majority_sign_method: str) -> None:
    """Raise a `ValueError` if one of these is no argument of `combine_deltas`."""
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}.")
    if majority_sign_method not in MAJORITIES:
        raise ValueError(f"majority_sign_method must be one of {', '.join(MAJORITIES)}, got {majority_sign_method!r}.")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}.")


def _thin(delta: SparseDelta, combination_type: str, density: float, generator: torch.Generator | None) -> SparseDelta:
    """The share `density` of a delta: its largest values, or for DARE random ones, rescaled."""
    count = round(density * delta.indices.numel())
    if combination_type == "linear" or count == delta.indices.numel():
        return delta
    if not count:
        return delta._replace(indices=delta.indices[:0], values=delta.values[:0], fingerprint=0)
    if combination_type.startswith("dare"):
        scores = torch.rand(delta.indices.numel(), generator=generator)
        delta = delta._replace(values=delta.values / density)
    else:
        scores = delta.values.abs().float()
    kept = select_largest({"delta": scores}, count)["delta"].to(delta.indices.device)
    return delta._replace(indices=delta.indices[kept], values=delta.values[kept], fingerprint=0)


def _agreeing_mean(rows: Tensor, majority_sign_method: str) -> Tensor:
    votes = rows.sign() if majority_sign_method == "frequency" else rows
    agree = (rows.sign() == votes.sum(0).sign()) & (rows != 0)
    return torch.where(agree, rows, 0).sum(0) / agree.sum(0).clamp(min=1)


def overlap(first: SparseDelta, second: SparseDelta) -> Overlap:
    """Compare the child networks of two adapters in one tensor.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes([first, second])
    shared = int(torch.isin(first.indices, second.indices, assume_unique=True).sum())
    return Overlap(shared, first.indices.numel(), second.indices.numel(), first.numel)


def _bits(tensor: Tensor) -> Tensor:
    """Bit patterns as integers, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _check_shapes(deltas: Sequence[SparseDelta]) -> None:
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"Deltas of one tensor must have the same shape, got {sorted(shapes)}.")
