"""The random gradient mask: what it draws, when it draws anew, and what it does to a gradient."""

import copy
import math

import pytest
import torch
from torch import nn

from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.mask_steps import MaskUse, watch


@pytest.mark.parametrize("density", [0.001, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-9])
def test_the_share_of_kept_entries_is_the_density(density):
    numel = 1_000_000
    for step in range(3):
        kept = int(GradientMask(density, step=step).draw("a.weight", numel).sum())
        assert abs(kept - density * numel) <= 4 * math.sqrt(numel * density * (1 - density)) + 1


def test_the_undecided_byte_is_decided_as_often_as_it_should():
    """A density between two bytes: 0.3 * 256 = 76.8, so that 77 or 76 bytes alone would be 3 and 13 sigma off."""
    numel = 20_000_000
    kept = int(GradientMask(0.3).draw("a.weight", numel).sum())
    assert abs(kept - 0.3 * numel) <= 4 * math.sqrt(numel * 0.3 * 0.7)


def test_a_mask_depends_on_seed_step_and_name_alone():
    mask = GradientMask(0.5, seed=3, step=7)
    drawn = mask.draw("a.weight", 1000)
    assert torch.equal(mask.draw("a.weight", 1000), drawn)
    others = [mask._replace(seed=4), mask._replace(step=8)]
    assert all(not torch.equal(other.draw("a.weight", 1000), drawn) for other in others)
    assert not torch.equal(mask.draw("b.weight", 1000), drawn)
    torch.manual_seed(9)
    assert torch.equal(GradientMask(0.5, seed=3, step=7).draw("a.weight", 1000), drawn)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9])
def test_any_number_of_entries(numel):
    assert GradientMask(0.5).draw("a", numel).shape == (numel,)


def test_masks_of_consecutive_steps_and_of_equal_shapes_are_independent():
    density, numel = 0.3, 1_000_000
    mask = GradientMask(density)
    first = mask.draw("a.weight", numel)
    for other in (mask._replace(step=1).draw("a.weight", numel), mask.draw("b.weight", numel)):
        both = int((first & other).sum())
        chance = density**2
        assert abs(both - chance * numel) <= 4 * math.sqrt(numel * chance * (1 - chance))


def test_several_steps_with_one_mask():
    mask = GradientMask(0.5, every=3)
    drawn = [mask._replace(step=step).draw("a", 1000) for step in range(7)]
    assert [step for step in range(1, 7) if not torch.equal(drawn[step], drawn[step - 1])] == [3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_masked_gradient_is_by_definition(dtype):
    gradient = torch.randn(6, 50, dtype=dtype)
    mask = GradientMask(0.3, step=2)
    masked = mask.apply("a.weight", gradient)
    kept = mask.draw("a.weight", 300).view(6, 50)
    assert torch.equal(masked[kept], gradient[kept] / 0.3)
    assert not masked[~kept].any()
    assert masked.dtype == dtype


def test_theorem_1_of_the_paper():
    """Mean and variance of the SGD update over many masks and batches, for gradients of known mean and variance."""
    draws, numel, density, lr, sigma, batch = 4000, 64, 0.3, 0.1, 0.5, 4
    mean = torch.linspace(-2, 2, numel, dtype=torch.float64)
    noise = torch.randn(draws, numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = mean + noise * sigma / math.sqrt(batch)
    updates = torch.stack(
        [-lr * GradientMask(density, step=step).apply("a", gradient) for step, gradient in enumerate(gradients)]
    )
    variance = lr**2 * (sigma**2 / (batch * density) + (1 - density) / density * mean**2)
    assert ((updates.mean(0) + lr * mean).abs() <= 4.5 * (variance / draws).sqrt()).all()
    # The fourth moment bounds how far a sample variance strays.
    fourth = ((updates - updates.mean(0)) ** 4).mean(0)
    assert ((updates.var(0) - variance).abs() <= 4.5 * ((fourth - variance**2) / draws).sqrt()).all()


def test_packing():
    mask = GradientMask(0.1, seed=2**63 - 1, every=4, step=12)
    packed = mask.pack()
    assert (packed.dtype, packed.shape) == (torch.int64, (4,))
    assert GradientMask.unpack(packed) == mask
    for wrong in (packed.int(), packed[:3], packed * 0, packed.index_fill(0, torch.tensor([0]), -1)):
        with pytest.raises(ValueError, match="A gradient mask"):
            GradientMask.unpack(wrong)


class Counter:
    """Counts what it is told of."""

    def __init__(self, parameters):
        self.parameters, self.steps = parameters, 0
        self.number = watch(self)

    def named_mask(self, key):
        return key, GradientMask(0.5, step=self.steps)

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
