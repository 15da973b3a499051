"""Combine several adapters of one base model in a new one, or compare them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from peft_child.files.adapter_folder import WITHOUT_SELECTION, SparseAdapter
from peft_child.tensors.combine import combine_named, density_of, union_of_names
from peft_child.tensors.delta import Overlap, Progress, SparseDelta, overlap, silent


def combine_adapters(
    adapters: Sequence[SparseAdapter],
    weights: Sequence[float],
    *,
    combination_type: str = "linear",
    density: float = 1.0,
    majority_sign_method: str = "total",
    seed: int = 0,
    progress: Progress = silent,
) -> SparseAdapter:
    """Combine adapters of one base model; see `combine_deltas` for what the arguments mean.

    Every delta is combined on each access, so memory is that of one tensor.

    Raises:
        ValueError: If an argument is out of range, an adapter has modules saved whole, or tensors differ in shape.
    """
    for adapter in adapters:
        if adapter.dense and len(adapters) > 1:
            raise ValueError(f"Modules saved whole cannot be combined; '{next(iter(adapter.dense))}' belongs to one.")
    deltas = combine_named(
        [adapter.deltas for adapter in adapters],
        weights,
        combination_type=combination_type,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
    )
    settings = dict(adapters[0].settings)
    # One adapter that keeps its positions is still described by the settings that chose them.
    keeps_positions = len(adapters) == 1 and (combination_type == "linear" or density == 1)
    if deltas and not keeps_positions:
        settings |= {**WITHOUT_SELECTION, "density": density_of(deltas, progress), "target_parameters": list(deltas)}
    return SparseAdapter(settings, deltas, adapters[0].dense)


def compare_adapters(adapters: Sequence[SparseAdapter]) -> dict[tuple[int, int], dict[str, Overlap]]:
    """Overlap of every two adapters, by their positions in the sequence, in every tensor that either changes."""
    found: dict[tuple[int, int], dict[str, Overlap]] = {}
    for first, second in combinations(range(len(adapters)), 2):
        deltas = adapters[first].deltas, adapters[second].deltas
        names = union_of_names(deltas)
        found[first, second] = {name: _overlap(name, deltas[0].get(name), deltas[1].get(name)) for name in names}
    return found


def _overlap(name: str, first: SparseDelta | None, second: SparseDelta | None) -> Overlap:
    if first is None or second is None:
        present = first or second
        assert present is not None
        empty = present._replace(indices=present.indices[:0], values=present.values[:0])
        return overlap(first or empty, second or empty)
    if first.numel != second.numel:
        raise ValueError(f"'{name}' has {first.numel} entries in one adapter and {second.numel} in another.")
    return overlap(first, second)
