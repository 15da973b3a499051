import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_child.tensors.compose import Child, Composition
from peft_child.tensors.delta import Overlap, SparseDelta, extract_delta, overlap, rounded_sum


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def delta_of(shape=(6, 5), count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    indices = torch.randperm(numel, generator=generator)[:count].sort().values
    return SparseDelta(shape, indices, torch.randn(count, generator=generator))


def dense(delta):
    return torch.zeros(delta.numel).index_put((delta.indices,), delta.values).view(delta.shape)


def apply_delta(base, delta):
    """What a model computes with, after a check that merging writes the same at the positions of the delta."""
    composed = Composition(base, (Child(delta.values, delta.indices),)).tensor()
    written = rounded_sum(base.flatten()[delta.indices], delta.values)
    assert torch.equal(bits(composed.flatten()[delta.indices]), bits(written))
    return composed


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extract_then_apply_is_exact_in_every_bit(dtype):
    base = torch.randn(20, 30).to(dtype)
    tuned = torch.where(torch.rand(20, 30) < 0.2, (base * (1 + torch.randn(20, 30) * 0.01)).to(dtype), base)
    tuned[0, 0], tuned[0, 1], base[0, 2], tuned[0, 2] = 0.0, -5.0, 0.0, -0.0 + 1e-3
    delta = extract_delta(base, tuned)
    assert delta.indices.numel() < 200
    assert torch.equal(bits(apply_delta(base, delta)), bits(tuned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(data=st.data())
def test_extract_then_apply_is_exact_for_any_low_precision_numbers(dtype, data):
    finite = st.integers(0, 2**16 - 1).map(lambda pattern: pattern - 2**15)
    patterns = data.draw(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
    base, tuned = torch.tensor(patterns, dtype=torch.int16).view(dtype).unbind(1)
    keep = base.isfinite() & tuned.isfinite() & ~((tuned == 0) & tuned.signbit())  # no sum is -0.0 but of zeros
    keep &= (tuned == 0) | (tuned.double().abs() > base.double().abs() * 2.0**-40)  # a float64 has 53 bits
    base, tuned = base[keep].contiguous(), tuned[keep].contiguous()
    delta = extract_delta(base, tuned)
    assert torch.equal(bits(apply_delta(base, delta)), bits(tuned))


def test_a_change_that_no_difference_expresses_is_refused():
    with pytest.raises(ValueError, match=r"change from 1.0 to .* at position 1 cannot be expressed"):
        extract_delta(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1e-30]))


def test_chosen_positions_keep_what_did_not_change():
    base = torch.randn(4, 4)
    tuned = base.clone()
    tuned[0, 0] += 1
    delta = extract_delta(base, tuned, torch.tensor([0, 7]))
    assert delta.indices.tolist() == [0, 7]
    assert delta.values[1] == 0
    assert torch.equal(apply_delta(base, delta), tuned)


def test_only_tensors_of_one_kind_are_compared():
    with pytest.raises(ValueError, match=r"same shape and dtype, got torch.float32 \(2,\) and torch.float32 \(3,\)"):
        extract_delta(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="same shape and dtype"):
        extract_delta(torch.ones(2), torch.ones(2).double())
    with pytest.raises(ValueError, match=r"same shape, got \[\(5, 6\), \(6, 5\)\]"):
        overlap(delta_of(), delta_of((5, 6)))


def test_overlap_with_itself_and_by_chance():
    delta = delta_of((200, 100), 5000)
    itself = overlap(delta, delta)
    assert (itself.jaccard, itself.shared, itself.numel) == (1.0, 5000, 20_000)
    other = overlap(delta, delta_of((200, 100), 5000, seed=1))
    assert 0.9 < other.over_chance < 1.1
    assert itself + other == Overlap(5000 + other.shared, 10_000, 10_000, 40_000)
    nothing = delta._replace(indices=delta.indices[:0], values=delta.values[:0])
    assert overlap(nothing, delta).jaccard == 0
