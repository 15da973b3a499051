"""Child networks that are drawn at random, and so are known before any data or file is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_child.layers.granularity import INPUT_CHANNEL, layout_of
from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.delta import SparseDelta, fresh_delta
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.partitioned import numel_of
from peft_child.tensors.topk import apportion, draw_random, seeded, select_largest
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.targets import Target


DRAWN = ("random", "task_free")


def drawn_children(targets: list[Target], config: ChildTuningConfig) -> Mapping[str, SparseDelta] | None:
    """Fresh deltas by name of the target, each made on access; None if the variant does not draw at random.

    What is drawn depends only on the seed and on the targets, so it is the same in every process.
    """
    counts = _counts(targets, config)
    if counts is None:
        return None
    parameters, layouts = {target.name: target.parameter for target in targets}, _layouts(targets)
    return Lazy(parameters, lambda name: drawn_child(config, name, parameters[name], layouts[name], counts[name]))


def is_of_a_file(targets: list[Target], config: ChildTuningConfig) -> bool:
    """Whether the configuration came with a file that has the child network, and was not changed since."""
    sizes = config.child_sizes
    if sizes is None:
        return False
    counts = _counts(targets, config)
    return counts is None or counts == {name: sizes[name].chosen if name in sizes else 0 for name in counts}


def _counts(targets: list[Target], config: ChildTuningConfig) -> dict[str, int] | None:
    """How many entries are drawn by name of the target, if the variant draws at random."""
    if config.variant not in DRAWN or not targets:
        return None
    numels = {target.name: numel_of(target.parameter) for target in targets}
    size = config.child_size(sum(numels.values()))
    if not _by_channel(config):
        return apportion(numels, size)
    layouts = _layouts(targets)
    scores = {name: _scores(name, layout, config.seed) for name, layout in layouts.items()}
    chosen = choose_channels(scores, layouts, size)
    return {name: len(numbers) * layouts[name].size for name, numbers in chosen.items()}


def _layouts(targets: list[Target]) -> dict[str, ChannelLayout]:
    """How input channels lie in the targets, by name."""
    return {
        target.name: layout_of(target.owners[0].place.module, target.owners[0].parameter, target.parameter)
        for target in targets
    }


def drawn_child(
    config: ChildTuningConfig, name: str, tensor: Tensor, layout: ChannelLayout, count: int
) -> SparseDelta:
    """A fresh delta of one tensor.

    Args:
        config: The configuration of the adapter; its seed and the name determine what is drawn.
        name: Name of the tensor.
        tensor: The tensor.
        layout: How input channels lie in it.
        count: Number of entries to draw; if channels are drawn, that of whole ones.
    """
    if not _by_channel(config):
        indices = draw_random(name, numel_of(tensor), count, config.seed)
        return fresh_delta(tensor, indices, config.init_weights)
    numbers = torch.arange(count // layout.size)
    if 0 < len(numbers) < layout.number:
        numbers = select_largest({name: _scores(name, layout, config.seed)}, len(numbers))[name]
    return fresh_delta(tensor, layout.positions(numbers), config.init_weights, layout)


def _by_channel(config: ChildTuningConfig) -> bool:
    """Whether channels are drawn; a task-free adapter has all entries, whatever its gradient mask drops."""
    return config.granularity == INPUT_CHANNEL and config.variant != "task_free"


def _scores(name: str, layout: ChannelLayout, seed: int) -> Tensor:
    """Random scores of the channels, each the sum over its entries."""
    return torch.rand(layout.number, generator=seeded(name, seed)) * layout.size
