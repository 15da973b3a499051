"""Where a model keeps the tensors of its checkpoint, found out without vLLM from models that load as its models do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_child.integrations.vllm_placement import UnplaceableError, place


class Loading(nn.Module):
    """A model with one weight, and a function that copies a tensor of the checkpoint into it."""

    def __init__(self, shape, copy, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.copy = copy

    @torch.no_grad()
    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "w":
                self.copy(self.weight.data, tensor)


WAYS = {
    "as it is": ((6, 4), lambda held, given: held.copy_(given)),
    "below another": ((10, 4), lambda held, given: held.narrow(0, 4, 6).copy_(given)),
    "beside another": ((6, 9), lambda held, given: held[:, 3:7].copy_(given)),
    "rows of it": ((2, 4), lambda held, given: held.copy_(given.narrow(0, 3, 2))),
    "columns of it": ((6, 2), lambda held, given: held.copy_(given[:, 1:3])),
    "a block of it": ((5, 7), lambda held, given: held[1:3, 2:4].copy_(given[4:, 2:])),
    "turned": ((4, 6), lambda held, given: held.copy_(given.t())),
    "a part of it, turned": ((3, 6), lambda held, given: held.copy_(given[:, 1:].t())),
    "one row": ((4,), lambda held, given: held.copy_(given[5])),
    "one column": ((6, 1), lambda held, given: held.copy_(given[:, 2:3])),
    "an expert of several": ((3, 6, 4), lambda held, given: held[1].copy_(given)),
    "a row for each of several": ((6, 1, 4), lambda held, given: held.copy_(given.unsqueeze(1))),
    "flat": ((24,), lambda held, given: held.copy_(given.reshape(-1))),
    "twice": ((12, 4), lambda held, given: [half.copy_(given) for half in held.chunk(2)]),
    "not here": ((6, 4), lambda held, given: None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_single_entries_are_written_where_the_whole_tensor_would_be(way, dtype):
    shape, copy = WAYS[way]
    model, slow = (Loading(shape, copy, dtype) for _ in range(2))
    if way == "flat":
        with pytest.raises(UnplaceableError, match="is no part of one in the checkpoint"):
            place(model, {"w": ((6, 4), torch.float32)})
        return
    whole = torch.arange(1.0, 25).view(6, 4)
    (placement,) = place(model, {"w": ((6, 4), torch.float32)}).values()
    assert not model.weight.any()
    slow.load_weights([("w", whole)])
    order = torch.randperm(24)
    for indices in (order[:9].sort().values, order[9:].sort().values.int()):
        values = whole.view(-1)[indices]
        placement.write(indices, values)
        assert not placement.differ(indices, values).any()
    assert torch.equal(model.weight, slow.weight)
    changed = placement.differ(torch.arange(24), whole.view(-1) + 100)
    assert changed.sum() == len(slow.weight.data[slow.weight.data != 0].unique())


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_block_of_a_tensor(shape, data):
    block = tuple(
        slice(start, data.draw(st.integers(start + 1, size)))
        for size in shape
        for start in [data.draw(st.integers(0, size - 1))]
    )
    order = data.draw(st.permutations(range(len(shape))))
    whole = torch.randn(shape)
    part = whole[block].permute(order)
    model = Loading(part.shape, lambda held, given: held.copy_(given[block].permute(order)))
    found = place(model, {"other": ((3,), torch.float16), "w": (tuple(shape), torch.float32)})["w"]
    found.write(torch.arange(whole.numel()), whole.view(-1))
    assert torch.equal(model.weight.data, part)


@pytest.mark.parametrize("what", ["register", "replace", "add"])
def test_weights_that_loading_replaces_are_put_back_and_refused(what):
    def copy(held, given):
        if what == "register":
            model.weight = nn.Parameter(torch.full((6, 4), 7.0))
        elif what == "replace":
            model.weight.data = torch.full((6, 4), 7.0)
        else:
            model.register_buffer("new", torch.ones(1))
        model.weight.data.copy_(given)

    model = Loading((6, 4), copy)
    weight, memory = model.weight, model.weight.data_ptr()
    with pytest.raises(UnplaceableError, match=r"The model replaces '(weight|new)' when it is loaded"):
        place(model, {"w": ((6, 4), torch.float32)})
    assert model.weight is weight
    assert model.weight.data_ptr() == memory
    assert not weight.any()
    assert not hasattr(model, "new")


@pytest.mark.parametrize(
    ("copy", "problem"),
    [
        (lambda held, given: held.copy_(-given.exp()), "is no part of one in the checkpoint"),
        (lambda held, given: held[:3].copy_((given * 2)[3:]), "is no part of one in the checkpoint"),
        (lambda held, given: held.copy_(given.to(torch.bfloat16)), "is no part of one in the checkpoint"),
        (lambda held, given: held.copy_(given[0]), "is no part of one in the checkpoint"),
        (lambda held, given: held.fill_(given.sum().item()), "meta"),
        (lambda held, given: held.__setitem__(0, given[0]), "meta"),
        (lambda held, given: torch.empty(0).copy_(given), "is no part of one in the checkpoint"),
        (lambda held, given: torch.empty(6, 4, dtype=torch.int8).copy_(given), "is no part of one in the checkpoint"),
    ],
)
def test_what_is_computed_is_refused_and_nothing_is_written(copy, problem):
    model = Loading((6, 4), copy)
    copy_before = torch.Tensor.copy_
    with pytest.raises(UnplaceableError, match=problem):
        place(model, {"v": ((9,), torch.float32), "w": ((6, 4), torch.float32)})
    assert torch.Tensor.copy_ is copy_before
    assert not model.weight.any()
