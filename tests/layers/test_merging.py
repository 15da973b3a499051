"""Merging one layer into its base parameters."""

import pytest
from torch import nn

from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, chosen_model, move, snapshot


def test_a_merge_that_cannot_finish_does_not_start():
    model = chosen_model("linear")
    move(model)
    last = list(child_tuning_layers(model).values())[-1]
    last.base_layer.weight = nn.Parameter(last.base_layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="is offloaded"):
        model.merge_adapter()
    assert not any(layer.merged for layer in child_tuning_layers(model).values())
    with pytest.raises(ValueError, match="There is no adapter 'typo'; there are default"):
        model.merge_and_unload(adapter_names=["typo"])


def test_a_merge_is_undone_after_a_change_of_dtype():
    model = chosen_model("linear", variant="random", init_weights=False)
    expected = {name: tensor.half() for name, tensor in snapshot(model).items() if "base_layer" in name}
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert_same({name: tensor for name, tensor in snapshot(model).items() if "base_layer" in name}, expected)
