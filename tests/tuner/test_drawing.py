"""Random child networks, known before any data: as many entries as the density says, the same in every process."""

import pytest
import torch

from peft_child.tensors.topk import apportion, draw_random
from peft_child.tuner.drawing import drawn_children
from peft_child.tuner.targets import find_targets

from ..helpers import config_for
from ..problems import build


def drawn(**changes):
    config = config_for("bert", target_modules=["query", "value"], **changes)
    targets = find_targets(build("bert"), config)
    return drawn_children(targets, config), {target.name: target.parameter for target in targets}


def test_entries_are_shared_out_among_the_targets_and_drawn_by_name():
    found, parameters = drawn(variant="random", density=0.3, seed=4)
    counts = apportion({name: parameter.numel() for name, parameter in parameters.items()}, round(0.3 * 1088))
    assert list(found) == list(parameters)
    for name, parameter in parameters.items():
        assert found[name].shape == tuple(parameter.shape)
        assert torch.equal(found[name].indices, draw_random(name, parameter.numel(), counts[name], 4))
        assert not found[name].values.any()
    assert sum(len(delta.indices) for delta in found.values()) == round(0.3 * 1088)


def test_channels_are_drawn_whole_and_as_many_as_fit():
    found, _ = drawn(variant="random", granularity="input_channel", density=0.3)
    assert 0 < sum(len(delta.indices) for delta in found.values()) <= round(0.3 * 1088)
    for delta in found.values():
        assert torch.equal(delta.layout.positions(delta.layout.holding(delta.indices)), delta.indices)
    again, _ = drawn(variant="random", granularity="input_channel", density=0.3)
    assert all(torch.equal(found[name].indices, again[name].indices) for name in found)


def test_task_free_adapters_have_all_entries_and_task_driven_ones_wait_for_data():
    found, parameters = drawn(variant="task_free")
    assert all(len(found[name].indices) == parameter.numel() for name, parameter in parameters.items())
    assert drawn(variant="task_driven")[0] is None


@pytest.mark.parametrize("init_weights", [True, False])
def test_values_start_as_the_configuration_says(init_weights):
    found, _ = drawn(variant="random", init_weights=init_weights)
    assert any(delta.values.any() for delta in found.values()) != init_weights
