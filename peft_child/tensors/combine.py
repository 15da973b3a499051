"""Weighted sums of sparse changes, plain or by TIES and DARE, on the union of their child networks.

Everything here works on plain tensors, one at a time, so that checkpoints of any size can be streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peft_child.tensors.delta import Progress, SparseDelta, check_shapes, check_share, silent
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.topk import seeded, select_largest


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
        density: Share of each *delta* that is kept, in (0, 1]. The delta may itself be a small part of the tensor.
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
    check_shapes(deltas)
    if len(deltas) == 1 and weights[0] == density == 1:
        return deltas[0]
    kept = [_thin(delta, combination_type, density, generator) for delta in deltas]
    union = torch.cat([delta.indices for delta in kept]).unique()
    # A delta that covers the union knows the fingerprint of the base values there.
    fingerprint = next((delta.fingerprint for delta in kept if delta.indices.equal(union)), 0)
    rows = []
    for delta, weight in zip(kept, weights, strict=True):
        values = delta.values.to(torch.promote_types(delta.values.dtype, torch.float32))
        row = torch.zeros(union.numel(), dtype=values.dtype, device=values.device)
        rows.append(row.index_copy_(0, torch.searchsorted(union, delta.indices), weight * values))
    if combination_type.endswith("ties"):
        combined = _agreeing_mean(torch.stack(rows), majority_sign_method)
    else:
        combined = sum(rows[1:], start=rows[0])
    # A union of whole channels consists of whole channels.
    layouts = {delta.layout for delta in kept}
    layout = layouts.pop() if len(layouts) == 1 else None
    return SparseDelta(deltas[0].shape, union, combined, fingerprint, layout)


def combine_named(
    adapters: Sequence[Mapping[str, SparseDelta]],
    weights: Sequence[float],
    *,
    combination_type: str = "linear",
    density: float = 1.0,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> Lazy[SparseDelta]:
    """Combine the deltas of several adapters in every tensor where one of them has any; see `combine_deltas`.

    Args:
        adapters: Deltas by name of the tensor, of each adapter.
        weights: One for each adapter.
        combination_type: As in `combine_deltas`.
        density: As in `combine_deltas`.
        majority_sign_method: As in `combine_deltas`.
        seed: For the random choices of DARE, which also depend on the name of the tensor.

    Returns:
        The combined deltas by name, float32 or wider, each combined anew on every access. Access raises `ValueError`
        if tensors of one name differ in shape.

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
    """Names of the tensors in which any adapter has a child, in the order of their first appearance."""
    return list(dict.fromkeys(name for deltas in adapters for name in deltas))


def density_of(deltas: Mapping[str, SparseDelta], progress: Progress = silent) -> float:
    """Share of the entries of all tensors together that the deltas hold; computes each delta once."""
    chosen = numel = 0
    for name in progress(list(deltas), "Combining"):
        delta = deltas[name]
        chosen, numel = chosen + delta.indices.numel(), numel + delta.numel
    return chosen / numel


def check_combination(combination_type: str, density: float, majority_sign_method: str) -> None:
    """Raise a `ValueError` if one of these is not a valid argument of `combine_deltas`."""
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}.")
    if majority_sign_method not in MAJORITIES:
        raise ValueError(f"majority_sign_method must be one of {', '.join(MAJORITIES)}, got {majority_sign_method!r}.")
    check_share("density", density)


def _thin(delta: SparseDelta, combination_type: str, density: float, generator: torch.Generator | None) -> SparseDelta:
    """Keep the share `density` of a delta: its largest values, or for DARE random ones, rescaled."""
    count = round(density * delta.indices.numel())
    if combination_type == "linear" or count == delta.indices.numel():
        return delta
    if delta.layout is not None:
        raise ValueError(
            f"A density of {density} would cut the input channels of a child network: combine such adapters at a "
            "density of 1.0, or first keep their largest channels (keep_largest)."
        )
    if not count:  # `select_largest` chooses at least one
        return delta._replace(indices=delta.indices[:0], values=delta.values[:0], fingerprint=0)
    if combination_type.startswith("dare"):
        scores = torch.rand(delta.indices.numel(), generator=generator)  # on the CPU, so that all devices draw alike
        delta = delta._replace(values=delta.values / density)  # the expected change stays the same
    else:
        scores = delta.values.abs().float()
    kept = select_largest({"delta": scores}, count)["delta"].to(delta.indices.device)
    # The fingerprint was that of all base values of the delta; that of a part is unknown.
    return delta._replace(indices=delta.indices[kept], values=delta.values[kept], fingerprint=0)


def _agreeing_mean(rows: Tensor, majority_sign_method: str) -> Tensor:
    """TIES: at each entry, the mean of the nonzero values that have the sign of the majority."""
    votes = rows.sign() if majority_sign_method == "frequency" else rows
    # Where the votes cancel, the majority has the sign 0, as have entries that a delta does not hold.
    agree = (rows.sign() == votes.sum(0).sign()) & (rows != 0)
    return torch.where(agree, rows, 0).sum(0) / agree.sum(0).clamp(min=1)
