"""Batches of any shape taken apart into examples."""

from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig, select_child_network


def collect(batches, **options):
    """The single examples that a Fisher pass sees."""
    seen = []
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ChildTuningConfig(density=0.5, target_modules=["0"]))

    def forward(model, batch):
        seen.append(batch)
        return model(torch.randn(1, 4)).square().sum()

    select_child_network(model, batches, forward_fn=forward, progress_bar=False, **options)
    examples = model.peft_config["default"].fisher_examples
    if examples > 1:
        del seen[2]  # the first two together, for comparison
    assert len(seen) == examples
    return seen


def shapes(batch):
    return {key: tuple(value.shape) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_what_else_is_in_a_batch_is_taken_apart_or_shared():
    batch = {
        "labels": torch.randn(2, 4),
        "text": ["a", "b"],
        "scale": torch.ones(1, 3),
        "flag": True,
        "s": torch.ones(()),
    }
    assert [shapes(example) for example in collect([batch])] == [
        {"labels": (1, 4), "text": [text], "scale": (1, 3), "flag": True, "s": ()} for text in "ab"
    ]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_batches_without_tensors_and_named_tuples():
    assert collect([{"ids": [0, 1, 2]}]) == [{"ids": [0]}, {"ids": [1]}, {"ids": [2]}]
    examples = collect([Pair(torch.zeros(2, 3), torch.ones(2))])
    assert [type(example) for example in examples] == [Pair, Pair]
    assert examples[0].x.shape == (1, 3)


def test_a_batch_of_one_is_never_cut():
    graph = {"nodes": torch.randn(5, 4), "label": torch.zeros(1)}
    assert [shapes(example) for example in collect([graph])] == [{"nodes": (5, 4), "label": (1,)}]
    packed = {"input_ids": torch.ones(1, 8), "labels": torch.ones(1, 8), "cu_seq_lens": torch.zeros(4)}
    assert len(collect([packed])) == 1
    several = {"nodes": torch.randn(5, 4), "edges": torch.randn(7, 2)}
    assert len(collect([several], split_batches=False)) == 1
    with pytest.raises(ValueError, match=r"agree in their first dimension.*\(5, 4\), \(7, 2\).*split_batches=False"):
        collect([several])
    with pytest.raises(ValueError, match=r"agree in their first dimension.*\(2, 4\), \(1, 3\)"):
        collect([{"x": torch.randn(2, 4), "y": torch.randn(1, 3)}])
