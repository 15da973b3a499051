"""Child networks that are drawn at random, and so are known before any data or file is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_child.tensors.channels import choose_channels
from peft_child.tensors.delta import SparseDelta, fresh_delta
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.topk import apportion, draw_random, seeded
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.granularity import INPUT_CHANNEL, layout_of
from peft_child.tuner.targets import Target


def drawn_children(targets: list[Target], config: ChildTuningConfig) -> Mapping[str, SparseDelta] | None:
    """Fresh deltas by name of the target, each drawn when it is asked for; None if the variant is not drawn.

    They depend on the seed and the names of the targets alone, so that they are the same in every process.
    """
    if config.variant not in ("random", "task_free") or not targets:
        return None
    parameters = {target.name: target.parameter for target in targets}
    numels = {name: parameter.numel() for name, parameter in parameters.items()}
    size = config.child_size(sum(numels.values()))
    if config.granularity != INPUT_CHANNEL:
        counts = apportion(numels, size)

        def entries(name: str) -> SparseDelta:
            indices = draw_random(name, numels[name], counts[name], config.seed)
            return fresh_delta(parameters[name], indices, config.init_weights)

        return Lazy(parameters, entries)
    layouts = {}
    for target in targets:
        first = target.owners[0]
        layouts[target.name] = layout_of(first.place.module, first.parameter, target.parameter)
    scores = {
        name: torch.rand(layout.number, generator=seeded(name, config.seed)) * layout.size
        for name, layout in layouts.items()
    }
    chosen = choose_channels(scores, layouts, size)

    def channels(name: str) -> SparseDelta:
        layout = layouts[name]
        return fresh_delta(parameters[name], layout.positions(chosen[name]), config.init_weights, layout)

    return Lazy(parameters, channels)
