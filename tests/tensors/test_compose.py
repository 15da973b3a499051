import pytest
import torch
from torch import nn

from peft_child.tensors.channels import ChannelLayout, Channels
from peft_child.tensors.compose import Child, Composition, call_composed, lock_of
from peft_child.tensors.composed_on_use import ComposedOnUse

from ..helpers import in_threads


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def child(numel, count, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=generator)[:count].sort().values
    delta = torch.randn(count, generator=generator) * 0.1
    return Child(delta.requires_grad_(requires_grad), indices)


def by_definition(base, children):
    """Entry by entry: the sum in at least float32, rounded once."""
    precise = torch.promote_types(base.dtype, torch.float32)
    flat = base.detach().to(precise).flatten().clone()
    for delta, indices, _ in children:
        for value, index in zip(delta.detach().tolist(), indices.tolist(), strict=True):
            flat[index] += torch.tensor(value, dtype=torch.float32).to(precise)
    return flat.to(base.dtype).view(base.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 2, 3])
def test_composed_values_equal_the_definition(dtype, adapters):
    base = torch.randn(5, 7).to(dtype)
    children = tuple(child(35, 9, seed=seed) for seed in range(adapters))
    composed = Composition(base, children).tensor()
    assert composed.dtype == dtype
    assert torch.equal(composed, by_definition(base, children))


def channels(shape, chosen):
    layout = ChannelLayout.of_shape(shape, is_bias=False, by_rows=False)
    return Child(torch.randn(len(chosen) * layout.size) * 0.1, Channels(layout, torch.tensor(chosen)))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "children",
    [[child(35, 9)], [channels((5, 7), [0, 3])], [Child(torch.randn(35), None)], [child(35, 9), child(35, 4, seed=1)]],
)
def test_values_in_another_dtype_are_those_of_the_base_cast(children, dtype, to):
    base = torch.randn(5, 7).to(dtype)
    composition = Composition(base, tuple(children))
    found = composition._replace(dtype=to).tensor()
    assert found.dtype == to
    assert torch.equal(found, composition.tensor().to(to))
    assert torch.equal(Composition(base, (), to).tensor(), base.to(to))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_autocast_is_that_to_which_it_casts(dtype):
    composition = Composition(torch.randn(5, 7).to(dtype), (child(35, 9),))
    assert composition.as_autocast() is composition
    with torch.autocast("cpu", torch.float16):
        found = composition.as_autocast().tensor()
        expected = torch.nn.functional.linear(torch.zeros(1, 7, dtype=dtype), composition.tensor()).dtype
    assert found.dtype == expected


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 4), (2, 2, 2, 2)])
def test_any_shape(shape):
    base = torch.randn(shape)
    one = child(base.numel(), 1)
    assert torch.equal(Composition(base, (one,)).tensor(), by_definition(base, (one,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_not_contiguous_keeps_row_major_positions(dtype):
    base = torch.randn(4, 6).to(dtype).t()
    one = child(24, 5)
    assert torch.equal(Composition(base, (one,)).tensor(), by_definition(base, (one,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_chosen_entries_of_the_dense_gradient(dtype):
    base = torch.randn(5, 7).to(dtype).requires_grad_()
    children = (child(35, 9), child(35, 4, seed=1))
    upstream = torch.randn(5, 7).to(dtype)
    (Composition(base, children).tensor() * upstream).sum().backward()
    assert torch.equal(base.grad, upstream)
    for delta, indices, _ in children:
        assert torch.equal(delta.grad, upstream.flatten()[indices].float())


def test_gradients_in_another_dtype_come_back_in_that_of_the_tensor():
    base = torch.randn(5, 7, requires_grad=True)
    one = child(35, 9)
    upstream = torch.randn(5, 7).bfloat16()
    (Composition(base, (one,), torch.bfloat16).tensor() * upstream).sum().backward()
    assert base.grad.dtype == one.delta.grad.dtype == torch.float32
    assert torch.equal(base.grad, upstream.float())
    assert torch.equal(one.delta.grad, upstream.flatten()[one.indices].float())


def linear_child(layer, seed=0):
    return {"weight": Composition(layer.weight, (child(layer.weight.numel(), 10, seed=seed),))}


def saved_bytes(function, ignored):
    """Bytes that autograd keeps for backward, beyond the ignored tensors."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        result = function()
    return sum(sizes.values()), result


def test_no_composed_copy_is_kept_for_backward():
    layer = nn.Linear(64, 64).requires_grad_(False)
    compositions = linear_child(layer)
    x = torch.randn(3, 64, requires_grad=True)
    delta = compositions["weight"].children[0].delta
    kept, result = saved_bytes(
        lambda: call_composed(layer, compositions, layer, (x,), {}), [x, delta, *layer.parameters()]
    )
    assert kept == 0
    result.sum().backward()
    expected = torch.autograd.grad(
        torch.nn.functional.linear(x, Composition(layer.weight, compositions["weight"].children).tensor()).sum(),
        [x, delta],
    )
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(delta.grad, expected[1])


def test_a_change_between_forward_and_backward_is_noticed():
    layer = nn.Linear(8, 8).requires_grad_(False)
    compositions = linear_child(layer)
    x = torch.randn(3, 8, requires_grad=True)
    result = call_composed(layer, compositions, layer, (x,), {})
    with torch.no_grad():
        compositions["weight"].children[0].delta.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        result.sum().backward()


def test_the_module_gets_its_parameters_back_even_after_an_error():
    layer = nn.Linear(4, 4)
    weight = layer.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_composed(layer, linear_child(layer), layer, (torch.randn(3, 5),), {})
    assert layer.weight is weight
    assert list(layer._parameters) == ["weight", "bias"]


def test_a_parameter_kept_in_the_instance_dictionary_is_swapped_too():
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.__dict__["weight"] = layer.weight  # as FSDP does in forward
    compositions = linear_child(layer)
    x = torch.randn(2, 4)
    expected = torch.nn.functional.linear(x, compositions["weight"].tensor(), layer.bias)
    assert torch.equal(call_composed(layer, compositions, layer, (x,), {}), expected)
    assert layer.__dict__["weight"] is layer._parameters["weight"]


def test_hooks_of_the_module_run():
    layer = nn.Linear(4, 4)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    call_composed(layer, linear_child(layer), layer, (torch.randn(2, 4),), {})
    assert len(seen) == 1


def test_activation_hooks_around_the_call_still_see_activations():
    layer = nn.Linear(16, 16)
    compositions = linear_child(layer)
    x = torch.randn(3, 16, requires_grad=True)
    kept, result = saved_bytes(lambda: call_composed(layer, compositions, layer, (x,), {}), [])
    assert kept == x.numel() * 4  # the input, and neither the composed weight nor the base
    result.sum().backward()


def test_threads_with_children_of_their_own_do_not_meet():
    layer = nn.Linear(32, 32).requires_grad_(False)
    x = torch.randn(4, 32)
    children = [linear_child(layer, seed=seed) for seed in range(3)]
    expected = [torch.nn.functional.linear(x, each["weight"].tensor(), layer.bias) for each in children]
    weight, wrong = layer.weight, []

    def work(which):
        for _ in range(200):
            with lock_of(layer):
                result = call_composed(layer, children[which], layer, (x,), {})
            if not torch.equal(result, expected[which]):
                wrong.append(which)

    in_threads(work, 3)
    assert not wrong
    assert layer.weight is weight


def test_looking_at_a_composed_weight_is_free_and_using_it_composes(monkeypatch):
    base = torch.randn(3, 4, dtype=torch.bfloat16)
    composition = Composition(base, (child(12, 3),))
    lazy = ComposedOnUse(composition)
    calls = []
    compose = Composition.tensor
    monkeypatch.setattr(Composition, "tensor", lambda self: calls.append(1) or compose(self))
    assert lazy.dtype == torch.bfloat16
    assert lazy.shape == (3, 4)
    assert (lazy.device, lazy.ndim, lazy.numel(), lazy.size(0), lazy.requires_grad) == (base.device, 2, 12, 3, True)
    assert not calls
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(torch.nn.functional.linear(x, lazy), torch.nn.functional.linear(x, compose(composition)))
    assert len(calls) == 1
    (lazy * 2).sum().backward()
    assert composition.children[0].delta.grad.eq(2).all()
