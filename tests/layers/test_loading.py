"""What a layer does with a file or a state dict that brings it a child network."""

import pytest
import torch
from torch import nn

from peft_child.layers.loading import LoadingLayer
from peft_child.tensors.codec import FormatError
from peft_child.tensors.delta import ChildSize, SparseDelta


TARGETS = {"weight": "layer.weight", "bias": "layer.bias"}


def layer_of(*positions):
    layer = LoadingLayer(nn.Linear(4, 3))
    layer.add_adapter("default", TARGETS, {})
    layer.set_adapter(["default"])
    if positions:
        child = SparseDelta((3, 4), torch.tensor(positions), torch.arange(len(positions)).float() + 1)
        layer.set_child("default", {"layer.weight": child}, trainable=True)
    return layer


def test_room_is_made_for_what_will_be_loaded():
    layer = layer_of()
    layer.mark_unloaded("default")
    layer.allocate("default", {"layer.weight": ChildSize(12, 3, 50)}, trainable=True)
    assert not layer.is_unloaded("default")
    assert layer.sizes("default") == {"layer.weight": ChildSize(12, 3, 50)}
    before = layer.named_deltas("default")["layer.weight"].data_ptr()
    layer.allocate("default", {"layer.weight": ChildSize(12, 3, 50)}, trainable=True)
    assert layer.named_deltas("default")["layer.weight"].data_ptr() == before


def test_a_state_dict_brings_its_own_child_network():
    source = layer_of(1, 5, 11)
    for layer in (layer_of(), layer_of(0, 2), layer_of(0, 2, 3)):
        layer.load_state_dict(source.state_dict())
        assert layer.indices("default", "weight").tolist() == [1, 5, 11]
        assert layer.named_deltas("default")["layer.weight"].tolist() == [1, 2, 3]


def test_a_state_dict_for_another_base_is_refused():
    state_dict = layer_of(1, 5).state_dict()
    other = LoadingLayer(nn.Linear(5, 3))
    other.add_adapter("default", TARGETS, {})
    with pytest.raises(FormatError, match="made for a tensor of 12 entries, and that of the base model has 15"):
        other.sizes_in(state_dict, "", "default")


def test_a_random_child_network_is_drawn_once_and_only_if_no_file_comes():
    drawn = []

    def draw(name, base, layout, count):
        drawn.append((name, count))
        return SparseDelta((3, 4), torch.arange(count), torch.zeros(count))

    sizes = {"layer.weight": ChildSize(12, 3, 50)}
    for comes in (False, True):
        layer = layer_of()
        layer.allocate("default", sizes, trainable=True)
        layer.mark_unloaded("default", draw)
        if comes:
            layer.load_state_dict(layer_of(1, 5, 11).state_dict())
        expected = [1, 5, 11] if comes else [0, 1, 2]
        assert layer.indices("default", "weight").tolist() == expected
        assert layer.indices("default", "weight").tolist() == expected
    assert drawn == [("layer.weight", 3)]


def test_an_empty_block_that_nothing_can_draw_is_an_error():
    layer = layer_of()
    layer.allocate("default", {"layer.weight": ChildSize(12, 3, 50)}, trainable=True)
    with pytest.raises(FormatError, match=r"The child of 'layer.weight' \(adapter 'default'\)"):
        layer.indices("default", "weight")
