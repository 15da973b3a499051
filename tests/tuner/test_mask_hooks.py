"""The gradient mask without an adapter."""

import gc

import pytest
import torch

from peft_child import mask_gradients

from .. import reference
from ..helpers import assert_same, snapshot, train
from ..problems import batch_of, build
from .test_task_free import OPTIMIZERS, factors


def test_hooks_with_a_random_mask_are_the_literal_method():
    model = build("bert")
    named = {name: parameter for name, parameter in model.named_parameters() if "query" in name}
    child = {name: torch.arange(parameter.numel()) for name, parameter in named.items()}
    batches = [batch_of("bert", seed) for seed in range(8)]
    expected = reference.masked_training(model, child, batches, OPTIMIZERS["sgd"], 2, factors(0.3, seed=5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    with mask_gradients(model.named_parameters(), density=0.3, seed=5):
        train(model, batches, OPTIMIZERS["sgd"], 2)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-6)


def test_hooks_with_a_fixed_child_network():
    model = build("linear")
    child = {"body.0.weight": torch.tensor([0, 5, 7]), "body.2.bias": torch.tensor([1])}
    everything = {name: torch.arange(parameter.numel()) for name, parameter in model.named_parameters()} | child
    batches = [batch_of("linear", seed) for seed in range(4)]
    expected = reference.masked_training(model, everything, batches, OPTIMIZERS["sgd"])
    with mask_gradients(model.named_parameters(), child_network=child):
        train(model, batches, OPTIMIZERS["sgd"])
    assert_same(snapshot(model), snapshot(expected))


def test_hooks_can_be_removed_and_resumed():
    model = build("linear")
    parameters = list(model.parameters())
    batch = batch_of("linear")
    plain = torch.autograd.grad(model(**batch).loss, parameters)
    handle = mask_gradients(parameters, density=0.5)
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def masked():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    first = masked()
    optimizer.step()
    second = masked()
    assert not torch.equal(first, second)
    state = handle.state_dict()
    handle.remove()
    handle.remove()
    assert torch.equal(masked(), torch.cat([gradient.flatten() for gradient in plain]))
    again = mask_gradients(parameters, density=0.5)
    assert torch.equal(masked(), first)
    again.load_state_dict(state)
    assert torch.equal(masked(), second)
    again.remove()
    with (
        mask_gradients(parameters, density=0.4) as other,
        pytest.raises(ValueError, match="must have the settings that it was saved with, density"),
    ):
        other.load_state_dict(state)
    with (
        mask_gradients(model.named_parameters(), density=0.5) as other,
        pytest.raises(ValueError, match="must belong to the same parameters"),
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, r"density must be a number in \(0, 1\], got 0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"resample_every": 0}, "resample_every must be a positive integer, got 0"),
        ({"child_network": {"x": torch.tensor([0])}}, "child_network names 'x', which is none of 'body.0.weight'"),
        ({"child_network": {"body.2.bias": torch.tensor([True])}}, "'body.2.bias' must be int64, got torch.bool"),
        ({"child_network": {"body.2.bias": torch.tensor([3])}}, r"'body.2.bias' must lie in \[0, 3\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_gradients(build("linear").named_parameters(), **arguments)


def test_hooks_live_without_their_handle():
    model, batch = build("linear"), batch_of("linear")
    mask_gradients(model.parameters(), density=0.5)
    gc.collect()
    model(**batch).loss.backward()
    assert 0 < sum(int((parameter.grad == 0).sum()) for parameter in model.parameters()) < 83
    with pytest.raises(ValueError, match="gradient of '0' is masked already"):
        mask_gradients(model.parameters(), density=0.5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (lambda model: model.body[0].weight, "got a Parameter"),
        (lambda model: model, r"such as model.named_parameters\(\), got a Regression"),
        (lambda model: dict(model.named_parameters()), "got a dict"),
        (lambda model: [("a", model.body[0].weight), ("a", model.body[2].weight)], "'a' or its tensor comes twice"),
        (lambda model: [("a", model.body[0].weight), ("b", model.body[0].weight)], "'b' or its tensor comes twice"),
    ],
)
def test_parameters_that_cannot_be_told_apart(parameters, message):
    with pytest.raises(ValueError, match=message):
        mask_gradients(parameters(build("linear")), density=0.5)


def test_nothing_to_mask():
    with pytest.raises(ValueError, match="at least one parameter that requires gradients"):
        mask_gradients(build("linear").requires_grad_(False).parameters(), density=0.5)
