"""Layers are put into a model and taken out again in every place, in time that grows with the model."""

import sys

import pytest
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig
from peft_child.layers.layer import child_tuning_layers
from peft_child.tuner.injection import parents_of


def of_many(count):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
    return model


def calls_of(work):
    """Number of calls of Python functions, which, unlike time, is the same on every machine."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(None) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("work", ["inject", "unload"])
def test_work_grows_with_the_number_of_modules_and_no_faster(work):
    counts = []
    for number in (50, 200):
        config = ChildTuningConfig(variant="random", density=0.5, target_modules=r"layers\.\d+")
        base, found = of_many(number), []
        inject = calls_of(lambda base=base, config=config, found=found: found.append(get_peft_model(base, config)))
        counts.append(inject if work == "inject" else calls_of(found[0].unload))
    assert counts[1] < 5 * counts[0]


def test_a_module_in_several_places_is_wrapped_and_unwrapped_in_all():
    base = nn.ModuleDict({"first": nn.Linear(3, 3), "inner": nn.Sequential(nn.Linear(3, 3))})
    base["again"] = base["inner"][0]
    shared = base["again"]
    assert [name for _, name in parents_of(base)[shared]] == ["again", "0"]
    model = get_peft_model(base, ChildTuningConfig(variant="random", density=0.5, target_modules=["again"]))
    (layer,) = child_tuning_layers(model).values()
    assert base["again"] is base["inner"][0] is layer
    model.unload()
    assert base["again"] is base["inner"][0] is shared


def test_a_layer_inside_a_layer_is_unwrapped_too():
    base = nn.Sequential(nn.MultiheadAttention(4, 2))
    modules = list(base.modules())
    config = ChildTuningConfig(variant="random", density=0.5, target_modules=["0"])
    model = get_peft_model(base, config)
    assert len(child_tuning_layers(model)) == 2
    model.unload()
    assert list(base.modules()) == modules
