"""What a layer holds of its adapters: made, replaced, thinned and deleted."""

import pytest
import torch
from torch import nn

from peft_child.layers.state import LayerState
from peft_child.tensors.delta import SparseDelta
from peft_child.tensors.gradient_mask import GradientMask


def state_of(mask=None):
    state = LayerState(nn.Linear(4, 3))
    state.add_adapter("default", {"weight": "layer.weight", "bias": "layer.bias"}, {}, mask)
    state.set_adapter(["default"])
    return state


def delta(*positions, shape=(3, 4)):
    return SparseDelta(shape, torch.tensor(positions), torch.arange(len(positions)).float() + 1)


def test_a_child_network_is_what_was_set():
    state = state_of()
    assert not state.is_chosen("default")
    state.set_child("default", {"layer.weight": delta(1, 5, 11), "other.weight": delta(0)}, trainable=True)
    assert state.is_chosen("default")
    assert state.is_trained("default")
    found = state.sparse_deltas("default")
    assert found.keys() == {"layer.weight"}
    assert found["layer.weight"].indices.tolist() == [1, 5, 11]
    assert found["layer.weight"].values.tolist() == [1, 2, 3]
    assert state.sizes("default")["layer.weight"][:2] == (12, 3)
    (child,) = state.children_of("weight", ["default"])
    assert child.delta.requires_grad
    assert not list(state.children_of("bias", ["default"]))


def test_an_empty_child_network_leaves_the_target_as_it_is():
    state = state_of()
    state.set_child("default", {"layer.weight": delta()}, trainable=True)
    assert state.is_chosen("default")
    assert not state.sizes("default")


def test_a_child_network_of_the_same_size_keeps_the_parameter():
    state = state_of()
    state.set_child("default", {"layer.weight": delta(1, 5), "layer.bias": delta(0, shape=(3,))}, trainable=True)
    before = list(state.parameters())
    state.set_child("default", {"layer.weight": delta(2, 7), "layer.bias": delta(0, 1, shape=(3,))}, trainable=True)
    after = list(state.parameters())
    kept = [any(parameter is other for other in before) for parameter in after]
    assert kept == [True, True, True, False]  # base weight and bias, the delta of the weight, not that of the bias
    assert state.indices("default", "weight").tolist() == [2, 7]


def test_a_part_can_be_kept():
    state = state_of(GradientMask(0.5))
    state.set_child("default", {"layer.weight": delta(1, 5, 11)}, trainable=True)
    assert state.counted_steps() == [0]
    state.keep("default", {"layer.weight": torch.tensor([0, 2])})
    assert state.indices("default", "weight").tolist() == [1, 11]
    assert state.named_deltas("default")["layer.weight"].tolist() == [1, 3]
    assert state.counted_steps() == []


def test_a_deleted_adapter_leaves_nothing():
    state = state_of()
    state.set_child("default", {"layer.weight": delta(1)}, trainable=True)
    state.delete_adapter("default")
    assert not state.adapters
    assert not [name for name in state.state_dict() if "child_" in name]


def test_a_parameter_that_is_gone_is_an_error():
    state = state_of()
    state.base_layer.bias = None
    with pytest.raises(RuntimeError, match="'bias' has a child network, but is no parameter of the Linear any more"):
        state.base_parameter("bias")
