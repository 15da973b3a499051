"""Linear layers trained by channels: the values of a plain layer, and the gradients of the chosen inputs alone."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_child import ChildTuningConfig
from peft_child.tensors.channel_linear import call_channels, can_call_channels
from peft_child.tensors.channels import ChannelLayout, Channels
from peft_child.tensors.compose import Child, Composition

from ..helpers import chosen_model
from ..problems import batch_of
from .test_compose import saved_bytes


OUT, IN = 40, 64


def composition(base, *chosen):
    """A child network for each list of channels."""
    layout = ChannelLayout(1, OUT, IN, 1)
    children = []
    for numbers in chosen:
        delta = (torch.randn(OUT * len(numbers)) * 0.1).requires_grad_()
        children.append(Child(delta, Channels(layout, torch.tensor(numbers))))
    return Composition(base, tuple(children))


def plain(x, weight, bias):
    """The obvious twin: a dense weight, and autograd."""
    total = weight.base.float()
    for child in weight.children:
        total = total.flatten().index_add(0, child.indices.positions(), child.delta).view(OUT, IN)
    return F.linear(x, total.to(weight.base.dtype), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, IN), (2, 5, IN), (IN,)])
@pytest.mark.parametrize("chosen", [[[0, 7, 63]], [[1, 2], [2, 3, 9]]])
def test_values_and_gradients_are_those_of_a_dense_weight(dtype, shape, chosen):
    base = torch.randn(OUT, IN, dtype=dtype)
    weight, x = composition(base, *chosen), torch.randn(shape, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    inputs = [x, bias, *(child.delta for child in weight.children)]
    upstream = torch.randn(*shape[:-1], OUT, dtype=dtype)
    found, expected = call_channels(x, weight, bias), plain(x, weight, bias)
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found, inputs, upstream)
    for gradient, twin in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert gradient.dtype == twin.dtype
        torch.testing.assert_close(gradient, twin, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_only_the_inputs_of_the_chosen_channels_are_kept():
    base, x = torch.randn(OUT, IN), torch.randn(50, IN)
    weight = composition(base, [3, 4])
    kept, result = saved_bytes(lambda: call_channels(x, weight, None), [])
    assert kept == 50 * 2 * 4
    result.sum().backward()


def test_nothing_as_large_as_a_weight_is_kept_by_a_model():
    model = chosen_model("llama", granularity="input_channel", variant="random")
    batch = batch_of("llama")
    own = [*model.parameters(), *model.buffers()]
    entries = chosen_model("llama", variant="random")
    with_channels, _ = saved_bytes(lambda: model(**batch).loss, own)
    without, _ = saved_bytes(lambda: entries(**batch).loss, [*entries.parameters(), *entries.buffers()])
    assert with_channels < without  # entries keep the inputs of linear layers as a whole


def test_autocast_computes_and_differentiates_in_its_dtype():
    base, x = torch.randn(OUT, IN), torch.randn(6, IN, requires_grad=True)
    weight = composition(base, [3, 4, 60])
    (child,) = weight.children
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = call_channels(x, weight, None), plain(x, weight, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [x, child.delta], upstream)
    twins = torch.autograd.grad(expected, [x, child.delta], upstream)
    for gradient, twin in zip(gradients, twins, strict=True):
        assert gradient.dtype == twin.dtype == torch.float32
        torch.testing.assert_close(gradient, twin, rtol=2e-2, atol=1e-2)


def test_a_change_between_forward_and_backward_is_noticed():
    x = torch.randn(3, IN, requires_grad=True)
    weight = composition(torch.randn(OUT, IN), [3])
    result = call_channels(x, weight, None)
    with torch.no_grad():
        weight.children[0].delta.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        result.sum().backward()


def hooked(kind):
    def make():
        module = nn.Linear(IN, OUT)
        getattr(module, f"register_{kind}")(lambda *arguments: None)
        return module

    return make


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.parametrize(
    ("make", "can"), [(lambda: nn.Linear(IN, OUT), True), *((hooked(kind), False) for kind in HOOKS)]
)
def test_only_what_is_trained_by_channels_and_has_no_hooks_is_called_this_way(make, can):
    module = make().requires_grad_(False)
    weight = composition(module.weight, [1, 2])
    assert can_call_channels(module, weight, False) == can
    frozen = Composition(module.weight, (weight.children[0]._replace(delta=weight.children[0].delta.detach()),))
    assert not can_call_channels(module, frozen, False)
    mixed = Composition(module.weight, (weight.children[0]._replace(indices=torch.tensor([1])),))
    assert not can_call_channels(module, mixed, False)
    assert not can_call_channels(module, weight, is_transposed=True)
    with torch.no_grad():
        assert not can_call_channels(module, weight, False)


def test_hooks_of_all_modules_are_run():
    module = nn.Linear(IN, OUT).requires_grad_(False)
    weight = composition(module.weight, [1, 2])
    handle = nn.modules.module.register_module_full_backward_pre_hook(lambda *arguments: None)
    try:
        assert not can_call_channels(module, weight, False)
    finally:
        handle.remove()
    assert can_call_channels(module, weight, False)


def test_the_transposed_weight_of_conv1d():
    base, bias = torch.randn(IN, OUT), torch.randn(OUT)
    layout = ChannelLayout(1, 1, IN, OUT)
    numbers = torch.tensor([0, 5, 63])
    delta = torch.randn(3 * OUT, requires_grad=True)
    weight = Composition(base, (Child(delta, Channels(layout, numbers)),))
    x = torch.randn(2, 7, IN, requires_grad=True)
    expected = torch.addmm(
        bias, x.view(-1, IN), base.flatten().index_add(0, layout.positions(numbers), delta).view(IN, OUT)
    ).view(2, 7, OUT)
    found = call_channels(x, weight, bias)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [x, delta], upstream)
    for gradient, twin in zip(gradients, torch.autograd.grad(expected, [x, delta], upstream), strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wide", "narrow"), [(8, 1), (1, 8), (1, 1)])
@pytest.mark.parametrize("kind", [nn.Linear, lambda wide, narrow: Conv1D(narrow, wide)])
def test_layers_of_one_input_or_output(kind, wide, narrow):
    base = nn.Sequential(kind(wide, narrow))
    config = {"density": 1.0, "target_parameters": ["0.weight"], "granularity": "input_channel"}
    model = get_peft_model(base, ChildTuningConfig(**config, variant="random", init_weights=False))
    x = torch.randn(3, wide, requires_grad=True)
    unmerged = model(x)
    unmerged.square().sum().backward()
    (delta,) = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), unmerged, rtol=0, atol=0 if wide + narrow > 2 else 1e-6)
    weight = merged[0].weight.requires_grad_()
    (expected,) = torch.autograd.grad(merged(x).square().sum(), weight)
    torch.testing.assert_close(delta, expected.flatten())


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_layer_that_computes_something_else_computes_it_as_ever():
    base = nn.Sequential(Scaled(6, 4))
    config = {"density": 0.5, "target_modules": ["0"], "granularity": "input_channel", "variant": "random"}
    model = get_peft_model(base, ChildTuningConfig(**config, init_weights=False))
    x = torch.randn(3, 6)
    unmerged = model(x)
    unmerged.sum().backward()
    model.merge_adapter()
    assert torch.equal(model(x), unmerged)
    assert any(parameter.grad is not None for parameter in model.parameters())
