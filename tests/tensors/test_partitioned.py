"""Parameters that look as if DeepSpeed had taken them over; for DeepSpeed see tests/integrations/test_deepspeed.py."""

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from torch import nn

from peft_child.tensors import partitioned
from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.mask_steps import MaskUse, count_steps, numbered


class Status(Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(tensor, status=Status.NOT_AVAILABLE):
    """A parameter as ZeRO-3 leaves it between calls."""
    parameter = nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.ds_id, parameter.ds_status, parameter.ds_shape = 0, status, tensor.shape
    return parameter


def test_sizes_are_those_of_the_whole_tensor():
    whole = torch.zeros(3, 4)
    for tensor in (whole, partition(whole)):
        assert partitioned.shape_of(tensor) == torch.Size([3, 4])
        assert partitioned.numel_of(tensor) == 12
    assert partitioned.is_partitioned(partition(whole))
    assert not partitioned.is_partitioned(whole)


@pytest.mark.parametrize("status", Status)
def test_what_is_not_gathered_is_named(status):
    parameter = partition(torch.zeros(3), status)
    assert partitioned.is_away(parameter) == (status is not Status.AVAILABLE)
    if status is Status.AVAILABLE:
        partitioned.check_gathered("Parameter 'a.weight'", parameter)
        return
    with pytest.raises(RuntimeError, match=r"Parameter 'a\.weight' is partitioned over processes \(ZeRO-3\)"):
        partitioned.check_gathered("Parameter 'a.weight'", parameter)


def test_tensors_of_no_engine_need_nothing():
    model = nn.Linear(2, 2)
    assert not partitioned.is_in_engine(model)
    assert not partitioned.is_optimized(model.weight)
    partitioned.check_gathered("it", model.weight)
    partitioned.check_not_optimized("it", model.weight, "load the adapter")
    partitioned.gather_with(model, (1 / 0 for _ in "not even looked at"))
    with partitioned.gathered_whole(model.parameters()):
        assert model.weight.numel() == 4
    assert not partitioned.copied_by(torch.optim.SGD(model.parameters(), lr=0.1))


def test_engines_are_recognised():
    hooked, optimized = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    hooked[0].ds_recompute_parameters = set()
    optimized.weight.get_full_hp_param = None
    engine = type("MyEngine", (type("DeepSpeedEngine", (nn.Module,), {}),), {})()
    assert all(map(partitioned.is_in_engine, (hooked, optimized, engine)))
    with pytest.raises(ValueError, match=r"'a' belongs to an engine of DeepSpeed, .*: load the adapter before"):
        partitioned.check_not_optimized("a", optimized.weight, "load the adapter")


class Wrapper:
    """What DeepSpeed's optimizers have: an optimizer of flat copies, and the parameters in groups."""

    __module__ = "deepspeed.runtime.zero"

    def __init__(self, groups):
        self.bit16_groups = groups
        self.copies = [nn.Parameter(torch.cat([each.detach() for each in group])) for group in groups]
        self.optimizer = torch.optim.SGD(self.copies, lr=0.1)

    def step(self):
        """Group after group, as DeepSpeed does it."""
        groups = self.optimizer.param_groups
        for copy in self.copies:
            copy.grad = torch.ones_like(copy)
            self.optimizer.param_groups = [{**groups[0], "params": [copy]}]
            self.optimizer.step()
        self.optimizer.param_groups = groups


class Counter:
    def __init__(self, parameters):
        self.steps = {id(parameter): 0 for parameter in parameters}
        self.number = numbered(self)
        count_steps(self.number)

    def masked(self, key, gradient):
        return GradientMask(0.5).apply(key, gradient)

    def count_step(self, stepped=None):
        for key in self.steps.keys() & stepped:
            self.steps[key] += 1


def test_steps_on_copies_count_once_for_what_they_are_copies_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    mine, other = ([nn.Parameter(torch.zeros(2)) for _ in range(3)] for _ in range(2))
    counter, another = Counter(mine), Counter(other)
    wrapper, second = Wrapper([mine[:2], mine[2:]]), Wrapper([other])
    assert partitioned.copied_by(wrapper.optimizer) == set(counter.steps)
    wrapper.step()  # DeepSpeed makes the optimizer's state so, before there is a gradient
    assert set(counter.steps.values()) == {0}
    for step in (1, 2):
        for _ in range(3):  # gradients are accumulated
            MaskUse(counter.number, "a").apply(torch.ones(2))
            MaskUse(another.number, "a").apply(torch.ones(2))
        wrapper.step()
        assert set(counter.steps.values()) == {step}
        assert set(another.steps.values()) == {step - 1}
        second.step()
        assert set(another.steps.values()) == {step}
        assert set(counter.steps.values()) == {step}
