"""The exact global choice from sharded scores: processes exchange counts and chosen positions, but no scores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_child.tensors.distributed import (
    add_over_ranks,
    gathered,
    is_sharded,
    on_every_rank,
    own_part,
    rank,
    world_size,
)
from peft_child.tensors.topk import Cutoff, check_scores, choose, count_ties, find_cutoff


def select_largest_of_shards(scores: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Choose the `size` largest scores of all tensors together, with the ties of `select_largest`.

    Every rank has to call it with the same names and size. No rank holds more scores than its own shards.

    Args:
        scores: float32 DTensors by name, sharded in their first dimension over all processes.
        size: Number of entries to choose.

    Returns:
        Strictly increasing flat indices into the whole tensors by name, int64, on the CPU, the same on every rank.

    Raises:
        ValueError: If a tensor is sharded in another way; otherwise as `select_largest`. Raised on every rank.
    """
    starts = on_every_rank(partial(_starts, scores))
    parts = {name: own_part(score) for name, score in scores.items()}
    cutoff = find_cutoff(parts, size, partial(_add_counts, next(iter(parts.values())).device))
    ties = gathered([count_ties(part, cutoff) for part in parts.values()])
    # Shards are rows in the order of the ranks, so among ties lower ranks go first, as smaller flat indices do.
    left = cutoff.ties
    chosen = {}
    for position, (name, part) in enumerate(parts.items()):
        before = sum(counts[position] for counts in ties[: rank()])
        mine, _ = choose(part, Cutoff(cutoff.threshold, max(0, left - before)))
        chosen[name] = mine.cpu() + starts[name]
        left = max(0, left - sum(counts[position] for counts in ties))
    shares = gathered(chosen)
    return {name: torch.cat([share[name] for share in shares]) for name in parts}


def _starts(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Check the scores; the flat position of the first entry of this rank's shard in each whole tensor."""
    starts = {}
    for name, score in scores.items():
        _check_placement(name, score)
        check_scores(name, own_part(score))
        rows = -(-score.shape[0] // world_size())  # as torch.chunk divides them
        # Bounded, since the last ranks may have no rows.
        starts[name] = min(rows * rank(), score.shape[0]) * (score.numel() // score.shape[0])
    return starts


def _check_placement(name: str, score: Any) -> None:
    if not is_sharded(score):
        raise ValueError(f"Either all scores are sharded or none; those of '{name}' are not.")
    if [placement.is_shard(0) for placement in score.placements] != [True] or score.device_mesh.size() != world_size():
        raise ValueError(
            f"Scores must be sharded in their first dimension over all processes; those of '{name}' have "
            f"{score.placements} over {score.device_mesh.size()} of {world_size()}. Pass their full_tensor()."
        )


def _add_counts(device: torch.device, counts: Tensor) -> None:
    """Add counts over the ranks, on the process group's device."""
    moved = counts.to(device)
    add_over_ranks(moved)
    counts.copy_(moved)
