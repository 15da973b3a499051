"""Child networks that are drawn at random, and so are known before any data or file is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.delta import SparseDelta, fresh_delta
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.topk import apportion, draw_random, seeded, select_largest
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.granularity import INPUT_CHANNEL, layout_of
from peft_child.tuner.targets import Target


DRAWN = ("random", "task_free")


def drawn_children(targets: list[Target], config: ChildTuningConfig) -> Mapping[str, SparseDelta] | None:
    """Fresh deltas by name of the target, each made on access; None if the variant does not draw at random.

    What is drawn depends only on the seed and on the targets, so it is the same in every process.
    """
    if config.variant not in DRAWN or not targets:
        return None
    parameters = {target.name: target.parameter for target in targets}
    numels = {name: parameter.numel() for name, parameter in parameters.items()}
    size = config.child_size(sum(numels.values()))
    layouts = {}
    for target in targets:
        first = target.owners[0]
        layouts[target.name] = layout_of(first.place.module, first.parameter, target.parameter)
    if _by_channel(config):
        scores = {name: _scores(name, layout, config.seed) for name, layout in layouts.items()}
        chosen = choose_channels(scores, layouts, size)
        counts = {name: len(numbers) * layouts[name].size for name, numbers in chosen.items()}
    else:
        counts = apportion(numels, size)
    return Lazy(parameters, lambda name: drawn_child(config, name, parameters[name], layouts[name], counts[name]))


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
        indices = draw_random(name, tensor.numel(), count, config.seed)
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
