"""Optimizer steps are counted once each, by whom they concern, and by nobody else."""

import copy
import math

import pytest
import torch
from torch import nn

from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.mask_steps import MaskUse, count_steps, numbered


class Counter:
    """Counts what it is told of."""

    def __init__(self, parameters, has_masks=True):
        self.parameters, self.steps = parameters, 0
        self.number = numbered(self)
        if has_masks:
            count_steps(self.number)

    def masked(self, key, gradient):
        return GradientMask(0.5, step=self.steps).apply(key, gradient)

    def count_step(self, stepped=None):
        self.steps += any(id(parameter) in stepped for parameter in self.parameters)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_noticed(kind):
    mine, other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    counter = Counter([mine])
    optimizer, another = OPTIMIZERS[kind]([mine, other]), OPTIMIZERS[kind]([other])
    for step, (each, steps) in enumerate([(optimizer, 1), (another, 1), (optimizer, 2)]):
        mine.grad, other.grad = torch.ones(3), MaskUse(counter.number, "a").apply(torch.full((3,), float(step)))
        each.step()
        assert counter.steps == steps


class Clipped(torch.optim.SGD):
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


def test_a_step_within_a_step_counts_once():
    """torch calls its hooks for both, once an optimizer of the outer and one of the inner class have been made."""
    parameter = nn.Parameter(torch.randn(3))
    torch.optim.SGD([parameter])
    counter, optimizer = Counter([parameter]), Clipped([parameter])
    for steps in (1, 2, 3):
        parameter.grad = MaskUse(counter.number, "a").apply(torch.ones(3))
        optimizer.step()
        assert counter.steps == steps


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, which has some of the parameters; as for sharded states, or SAM."""

    def __init__(self, parameters, inner, between=lambda: None):
        super().__init__(parameters, {})
        self.inner, self.between = inner, between

    def step(self, closure=None):
        self.between()
        self.inner.step()


@pytest.mark.parametrize("has_backward_inside", [False, True])
def test_an_optimizer_within_an_optimizer_counts_once(has_backward_inside):
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    counters = Counter([first]), Counter([second])

    def backward():
        first.grad = MaskUse(counters[0].number, "a").apply(torch.ones(3))

    inner = torch.optim.SGD([first])
    optimizer = Wrapper([first, second], inner, backward if has_backward_inside else lambda: None)
    for steps in (1, 2, 3):
        backward()
        optimizer.step()
        assert [counter.steps for counter in counters] == [steps, steps]


def test_steps_without_gradients_and_after_errors_count():
    parameter = nn.Parameter(torch.randn(3))
    counter, optimizer = Counter([parameter]), torch.optim.SGD([parameter])
    for steps in (1, 2):  # no gradient was masked here; other ranks may have had some
        optimizer.step()
        assert counter.steps == steps
    failing = Wrapper([parameter], optimizer, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.step()
    for steps in (3, 4):
        parameter.grad = MaskUse(counter.number, "a").apply(torch.ones(3))
        optimizer.step()
        assert counter.steps == steps


def test_a_closure_with_several_backward_passes_is_one_step():
    parameter = nn.Parameter(torch.randn(3))
    counter = Counter([parameter])
    optimizer = torch.optim.LBFGS([parameter], max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = (parameter - 1).square().sum()
        loss.backward()
        parameter.grad = MaskUse(counter.number, "a").apply(parameter.grad)
        return loss

    for steps in (1, 2):
        optimizer.step(closure)
        assert counter.steps == steps


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_a_grad_scaler_skips_does_not_count(kind):
    parameter = nn.Parameter(torch.ones(3))
    counter = Counter([parameter])
    optimizer = OPTIMIZERS[kind]([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        before = parameter.detach().clone()
        scaler.scale((parameter * factor).sum()).backward()
        parameter.grad = MaskUse(counter.number, "a").apply(parameter.grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert counter.steps == steps
        assert torch.equal(parameter, before) == math.isinf(factor)


def test_who_has_no_mask_counts_nothing():
    mine = nn.Parameter(torch.randn(3))
    counter = Counter([mine], has_masks=False)
    optimizer = torch.optim.SGD([mine], lr=0.1)
    optimizer.step()
    assert counter.steps == 0
    count_steps(counter.number)
    optimizer.step()
    assert counter.steps == 1


def test_a_mask_is_looked_up_when_the_gradient_arrives():
    parameter = nn.Parameter(torch.ones(100))
    counter = Counter([parameter])
    use = MaskUse(counter.number, "a")
    first = use.apply(torch.ones(100))
    assert torch.equal(use.apply(torch.ones(100)), first)
    counter.steps = 1
    assert not torch.equal(use.apply(torch.ones(100)), first)
    assert copy.deepcopy(use) == use


def test_the_operator_for_the_compiler_is_the_same_function():
    counter = Counter([])
    gradient = torch.randn(10, 10)
    expected = MaskUse(counter.number, "a").apply(gradient)
    assert torch.equal(torch.ops.peft_child.mask_gradient(gradient, counter.number, "a"), expected)
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.peft_child.mask_gradient.default.tags
    torch.library.opcheck(torch.ops.peft_child.mask_gradient.default, (gradient, counter.number, "a"))
