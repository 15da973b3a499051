"""The weight of a wrapped layer as others see it: its shape, its values, and nothing written that is lost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.composed_on_use import ComposedOnUse

from ..helpers import batch_of, build, chosen_model, logits, move, snapshot


ONLY_WEIGHTS = {"target_modules": None, "target_parameters": ["body.0.weight", "body.2.weight"]}


def adapted(kind="linear", chosen=True, **changes):
    if chosen:
        model = chosen_model(kind, **changes)
        move(model)
        return model
    return get_peft_model(build(kind), ChildTuningConfig(density=0.3, target_modules="all-linear"))


def layer_of(model):
    return next(iter(child_tuning_layers(model).values()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("chosen", [True, False])
def test_what_a_weight_is_made_of_can_be_read_at_any_time(chosen, train, grad):
    layer = layer_of(adapted(chosen=chosen).train(train))
    base = layer.base_layer.weight
    with torch.set_grad_enabled(grad):
        assert hasattr(layer, "weight")
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
        assert (weight.stride(), weight.ndim, weight.nbytes) == (base.stride(), base.ndim, base.nbytes)
        assert len(weight) == len(base)
        assert isinstance(weight, nn.Parameter)


def test_computing_with_the_weight_of_an_adapter_without_child_network_is_an_error_in_training():
    layer = layer_of(adapted(chosen=False).train())
    with pytest.raises(RuntimeError, match="has not been chosen"):
        layer.weight.sum()
    with torch.no_grad():
        assert torch.equal(layer.weight, layer.base_layer.weight)


def test_the_weight_of_a_base_without_values_can_be_looked_at():
    model = adapted()
    layer = layer_of(model)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer.weight.is_meta
            with pytest.raises(RuntimeError, match="offloaded"):
                layer.weight.sum()


WRITES = {
    "fill_": lambda layer: layer.weight.fill_(0),
    "data": lambda layer: layer.weight.data.fill_(0),
    "detach": lambda layer: layer.weight.detach().zero_(),
    "detach twice": lambda layer: layer.weight.data.detach().zero_(),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "item of data": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "set data": lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
    "in-place operator": lambda layer: layer.weight.__iadd__(1),
    "out": lambda layer: torch.add(torch.zeros(1), 1, out=layer.weight.data),
    "initialise": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "gradient": lambda layer: setattr(layer.weight, "grad", torch.zeros_like(layer.base_layer.weight)),
    "numpy": lambda layer: layer.weight.detach().numpy().__setitem__(0, 1.0),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros(6, 6))),
    "registered elsewhere": lambda layer: setattr(nn.Linear(6, 6), "weight", layer.weight),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros_like(layer.base_layer.weight))),
}


INTO_VIEWS = {
    "row": lambda layer: layer.weight[0].fill_(0),
    "row of data": lambda layer: layer.weight.data[0].zero_(),
    "transposed": lambda layer: layer.weight.T.fill_(1),
    "flat": lambda layer: layer.weight.view(-1).zero_(),
    "part": lambda layer: layer.weight.data.chunk(2)[0].zero_(),
    "view of a view": lambda layer: layer.weight.data[0][1:].zero_(),
    "item of a view": lambda layer: layer.weight.data.T.__setitem__(0, 1.0),
    "rows": lambda layer: next(iter(layer.weight.data)).zero_(),
    "list": lambda layer: torch._foreach_zero_([layer.weight]),
    "positional inplace": lambda layer: F.relu(layer.weight, True),
}
REFUSED = r"composed|nference|unload\(\)|read-only|swap"


def check_refused(write, mode):
    model = adapted()
    before = snapshot(model)
    with mode, pytest.raises((RuntimeError, ValueError), match=REFUSED):
        write(layer_of(model))
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model).items())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WRITES | INTO_VIEWS)
def test_no_value_is_written_and_lost(way, grad):
    check_refused((WRITES | INTO_VIEWS)[way], torch.set_grad_enabled(grad))


@pytest.mark.parametrize("way", [way for way in WRITES if way != "out"])
def test_no_value_is_written_and_lost_in_inference_mode(way):
    check_refused(WRITES[way], torch.inference_mode())


def test_what_is_computed_from_a_weight_can_be_written():
    weight = layer_of(adapted()).weight
    for computed in (weight.detach().clone(), weight + 0, weight.T @ weight, weight.detach().T + 1):
        assert type(computed) is torch.Tensor
        computed.detach().zero_()


def test_views_of_a_weight_carry_its_gradient():
    layer = layer_of(adapted())
    (layer.weight.T[0] * 2).sum().backward()
    delta, indices = next(iter(layer.child_delta["default"].values())), layer.indices("default", "weight")
    assert torch.equal(delta.grad, 2.0 * (indices % layer.base_layer.weight.shape[1] == 0))


@pytest.mark.parametrize("grad", [True, False])
def test_a_copy_of_a_weight_is_a_parameter_of_its_own(grad):
    layer = layer_of(adapted())
    with torch.set_grad_enabled(grad):
        found = copy.deepcopy(layer.weight)
        assert torch.equal(found, layer.weight)
    assert type(found) is nn.Parameter
    found.data.zero_()
    assert layer.weight.count_nonzero() > 0


@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_can_be_printed(grad):
    layer = layer_of(adapted())
    with torch.set_grad_enabled(grad):
        assert str((layer.weight + 0).detach()) in repr(layer.weight)
    assert "has not been chosen" in repr(layer_of(adapted(chosen=False).train()).weight)


@pytest.mark.parametrize("way", ["freeze", "hook"])
def test_a_composed_weight_keeps_nothing(way):
    weight = layer_of(adapted()).weight
    with pytest.raises(RuntimeError, match="composed whenever it is read"):
        weight.requires_grad_(False) if way == "freeze" else weight.register_hook(print)


@pytest.mark.parametrize("state", ["merged", "disabled", "not targeted"])
def test_what_is_the_base_parameter_itself_is_written(state):
    model = adapted(**ONLY_WEIGHTS)
    layer = layer_of(model)
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    name = "bias" if state == "not targeted" else "weight"
    getattr(layer, name).data.fill_(2)
    assert layer.base_layer._parameters[name].eq(2).all()


def test_attributes_that_have_no_child_network_are_set_on_the_base_layer():
    layer = layer_of(adapted(**ONLY_WEIGHTS))
    value = nn.Parameter(torch.ones_like(layer.base_layer.bias))
    layer.bias = value
    assert layer.base_layer.bias is value
    layer.weight = layer.base_layer.weight
    layer.mark = 3
    assert layer.mark == 3


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["llama_tied_head", "gpt2_tied", "t5"])
def test_weights_can_be_tied_again(kind, grad):
    model = adapted(kind)
    batch = batch_of(kind)
    expected = logits(model, batch)
    with torch.set_grad_enabled(grad):
        model.base_model.model.tie_weights()
        model.tie_weights()
    assert torch.equal(logits(model, batch), expected)


def test_a_weight_read_with_gradients_composes_and_one_read_without_is_plain_to_torch():
    layer = layer_of(adapted())
    assert isinstance(layer.weight, ComposedOnUse)
    with torch.no_grad():
        weight = layer.weight
        assert not torch.overrides.has_torch_function((weight,))
        assert torch.equal(weight, layer.weight)
        assert type(weight + 0) is torch.Tensor
        assert weight.data.numpy() is not None
