"""Makes a dense change sparse: the child network of the entries that moved most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from peft_child.files.adapter_folder import WITHOUT_MASK
from peft_child.selection.select import adapter_of
from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.delta import SparseDelta
from peft_child.tensors.distributed import check_whole
from peft_child.tensors.topk import select_largest
from peft_child.tuner.config import ChildTuningConfig


class Kept(NamedTuple):
    """What `keep_largest` kept.

    Attributes:
        chosen: Entries in the child network.
        trained: Entries that were trained before.
        norm_share: L2 norm of the changes that were kept, over that of all.
        largest_dropped: Largest absolute change that was dropped; dropped entries are as in the base model again.
    """

    chosen: int
    trained: int
    norm_share: float
    largest_dropped: float

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"kept {self.chosen:,} of {self.trained:,} trained entries, {self.norm_share:.1%} of the norm of their "
            f"changes; the largest change dropped is {self.largest_dropped:.3g}"
        )


def keep_largest(model: nn.Module, density: float, *, adapter_name: str = "default") -> Kept:
    """Turn a trained adapter into a sparse one: keep its largest changes, and reset the other entries to the base.

    This makes a small file of a task-free adapter (Child-Tuning_F), whose change is dense after some steps. The model
    gets worse; evaluate it before and after. The deltas are new parameters, so further training needs a new optimizer.

    Args:
        model: A model with a trained Child-Tuning adapter.
        density: Share of the targeted entries to keep, in (0, 1]: exactly `round(density * n)` of n; or whole input
            channels, those with the largest mean squared change first, until the next would exceed that number.
        adapter_name: The adapter; it must be active.

    Returns:
        How much was kept; printing it gives one line.

    Raises:
        ValueError: If the density is out of range or above that of the adapter, nothing was trained, or a change is
            not finite.
    """
    config, layers, targets, layouts = adapter_of(model, adapter_name)
    for name, parameter in targets.items():
        check_whole(name, parameter, "save the adapter, and keep its largest changes in one process")
    for layer in layers:
        layer.check_is_chosen(adapter_name, "keeping its largest changes")
    changed = {name: delta for layer in layers for name, delta in layer.named_deltas(adapter_name).items()}
    kept = replace(
        config, variant="extracted", density=density, **WITHOUT_MASK, fisher_examples=None, child_sizes=None
    )
    targeted = sum(parameter.numel() for parameter in targets.values())
    size = kept.child_size(targeted)
    trained = sum(delta.numel() for delta in changed.values())
    if size > trained and (not layouts or density > config.density):  # whole channels may hold fewer entries
        raise ValueError(
            f"density must be at most that of the adapter; {density} would keep {size} entries, and it has {trained}."
        )
    for name, delta in changed.items():
        if not delta.isfinite().all():
            raise ValueError(f"Changes must be finite; those of '{name}' hold another value.")
    if not any(bool(delta.any()) for delta in changed.values()):
        raise ValueError(f"Adapter '{adapter_name}' has not been trained: none of its entries has changed.")
    if layouts:
        deltas = {name: delta for layer in layers for name, delta in layer.sparse_deltas(adapter_name).items()}
        chosen = _largest_channels(deltas, layouts, size, targeted)
        size = sum(map(len, chosen.values()))
    else:
        chosen = select_largest({name: delta.abs().float() for name, delta in changed.items()}, size)

    kept_squares = all_squares = dropped = 0.0
    for name, delta in changed.items():
        dropped = max(dropped, float(delta.index_fill(0, chosen[name], 0).abs().max()))
        kept_squares += float(delta[chosen[name]].double().square().sum())
        all_squares += float(delta.double().square().sum())
    for layer in layers:
        layer.keep(adapter_name, chosen, layouts)
    cast(dict[str, ChildTuningConfig], model.peft_config)[adapter_name] = kept
    return Kept(size, trained, (kept_squares / all_squares) ** 0.5, dropped)


def _largest_channels(
    deltas: Mapping[str, SparseDelta], layouts: Mapping[str, ChannelLayout], size: int, total: int
) -> dict[str, Tensor]:
    """Which values of each delta belong to the channels that moved most, by their mean squared change."""
    ranks, squares, trained = {}, {}, {}
    for name, delta in deltas.items():
        # Only the trained channels can be kept: number them 0, 1, ... and choose among these.
        found, ranks[name] = layouts[name].channel_of(delta.indices).unique(return_inverse=True)
        trained[name] = ChannelLayout(1, layouts[name].size, len(found), 1)
        squares[name] = torch.zeros(len(found), device=ranks[name].device)
        squares[name].index_add_(0, ranks[name], delta.values.detach().float().square())
    chosen = choose_channels(squares, trained, size, total)
    return {name: torch.isin(rank, chosen[name].to(rank.device)).nonzero().flatten() for name, rank in ranks.items()}
