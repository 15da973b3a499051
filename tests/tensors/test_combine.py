"""Sums of deltas, TIES and DARE on the union of child networks."""

import pytest
import torch

from peft_child.tensors.combine import COMBINATIONS, combine_deltas
from peft_child.tensors.delta import SparseDelta

from .test_delta import delta_of, dense


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_adapter_at_weight_one_comes_back_as_it_was(combination):
    delta = delta_of()
    combined = combine_deltas([delta], [1.0], combination_type=combination)
    assert combined.indices is delta.indices
    assert combined.values is delta.values


def test_linear_is_the_weighted_sum_on_the_union_in_either_order():
    first, second = delta_of(seed=0), delta_of(seed=1)
    combined = combine_deltas([first, second], [0.3, -2.0])
    torch.testing.assert_close(dense(combined), 0.3 * dense(first) - 2.0 * dense(second))
    assert combined.indices.tolist() == sorted({*first.indices.tolist(), *second.indices.tolist()})
    other = combine_deltas([second, first], [-2.0, 0.3])
    assert torch.equal(other.indices, combined.indices)
    torch.testing.assert_close(other.values, combined.values, rtol=1.2e-7, atol=0)


def test_densities_are_shares_of_the_delta_not_of_the_tensor():
    delta = delta_of((100, 100), 50)
    pruned = combine_deltas([delta], [1.0], combination_type="magnitude_prune", density=0.5)
    assert pruned.indices.numel() == 25
    kept = delta.values.abs().sort(descending=True).values[:25]
    assert torch.equal(pruned.values.abs().sort(descending=True).values, kept)
    dropped = combine_deltas([delta], [1.0], combination_type="dare_linear", density=0.5)
    assert dropped.indices.numel() == 25
    assert torch.equal(dense(dropped)[dense(dropped) != 0], 2 * dense(delta)[dense(dropped) != 0])
    again = [
        combine_deltas([delta], [1.0], combination_type="dare_linear", density=0.5,
                       generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(again[0].indices, again[1].indices)
    assert not torch.equal(again[0].indices, again[2].indices)


@pytest.mark.parametrize(("majority", "expected"), [("total", [-3.0, 2.0, 1.0]), ("frequency", [1.5, 2.0, 1.0])])
def test_ties_averages_what_agrees_with_the_majority(majority, expected):
    parts = [
        SparseDelta((3,), torch.tensor([0, 1]), torch.tensor([1.0, 1.0])),
        SparseDelta((3,), torch.tensor([0, 1]), torch.tensor([2.0, 3.0])),
        SparseDelta((3,), torch.tensor([0, 2]), torch.tensor([-3.5, 1.0])),
        SparseDelta((3,), torch.tensor([2]), torch.tensor([1.0])),
    ]
    parts[2].values[0] = -3.0 if majority == "frequency" else -3.0 - 1e-4
    combined = combine_deltas(parts, [1.0] * 4, combination_type="ties", majority_sign_method=majority)
    torch.testing.assert_close(combined.values, torch.tensor(expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "svd"}, "combination_type must be one of linear, ties.*got 'svd'"),
        ({"density": 0}, r"density must be a number in \(0, 1\], got 0"),
        ({"majority_sign_method": "all"}, "majority_sign_method must be one of total, frequency, got 'all'"),
        ({"weights": [1.0]}, "Every delta needs one weight, got 2 deltas and 1 weights"),
    ],
)
def test_bad_arguments(arguments, message):
    weights = arguments.pop("weights", [1.0, 1.0])
    with pytest.raises(ValueError, match=message):
        combine_deltas([delta_of(), delta_of()], weights, **arguments)
