"""Squared gradients from parts equal those of whole gradients, for every kind of part and any tile."""

import pytest
import torch

from peft_child.selection import example_gradients
from peft_child.selection.example_gradients import Each, Product, Rows, Whole, add_squares, product
from peft_child.tensors.channels import ChannelLayout


EXAMPLES, TOKENS, HEIGHT, WIDTH = 3, 5, 130, 4
WEIGHTS = [1.0, 4.0, 0.0]


def parts_of(kind):
    """A part of each kind, with the gradients that it stands for."""
    torch.manual_seed(0)
    left, right = torch.randn(EXAMPLES, TOKENS, HEIGHT), torch.randn(EXAMPLES, TOKENS, WIDTH)
    dense = torch.stack([left[index].T @ right[index] for index in range(EXAMPLES)])
    if kind == "product":
        return Product(left, right, [slice(0, TOKENS)] * EXAMPLES), dense
    if kind == "one token":
        one = [slice(index, index + 1) for index in range(EXAMPLES)]
        return Product(left, right, one), torch.stack([left[b, [b]].T @ right[b, [b]] for b in range(EXAMPLES)])
    if kind == "rows":
        ids = torch.randint(HEIGHT, (EXAMPLES, TOKENS))
        ids[:, 1] = ids[:, 0]  # a token that comes twice
        whole = torch.zeros(EXAMPLES, HEIGHT, WIDTH)
        for example in range(EXAMPLES):
            for token in range(TOKENS):
                whole[example, ids[example, token]] += right[example, token]
        return Rows(ids, right, HEIGHT), whole
    return (Whole(dense) if kind == "whole" else Each(lambda example: dense[example])), dense


KINDS = ["product", "one token", "rows", "whole", "each"]


@pytest.mark.parametrize("tile", [1, 2**19])
@pytest.mark.parametrize("second", [None, *KINDS])
@pytest.mark.parametrize("first", KINDS)
def test_squares_are_those_of_the_summed_gradients(first, second, tile, monkeypatch):
    monkeypatch.setattr(example_gradients, "_TILE", tile)
    parts = [parts_of(kind) for kind in (first, second) if kind]
    gradients = sum(dense for _, dense in parts)
    expected = sum(weight * gradient.square() for weight, gradient in zip(WEIGHTS, gradients, strict=True))
    score = torch.ones(HEIGHT, WIDTH)
    add_squares(score, [part for part, _ in parts], WEIGHTS, score.device)
    torch.testing.assert_close(score, 1 + expected, rtol=1e-5, atol=1e-5)


def test_tokens_without_a_gradient_are_left_out():
    gradients = torch.randn(3, 6, 20)
    gradients[0, :2] = 0
    gradients[1] = 0
    gradients[2, 3:, :19] = 0  # what is not zero there comes late
    found = product(gradients, gradients, gradients).tokens
    assert found == [slice(2, 6), slice(0, 0), slice(0, 6)]


def test_sums_over_channels_are_never_negative():
    """Not even where the gradient is zero but for rounding."""
    torch.manual_seed(0)
    gradient, x = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
    left, right = torch.cat([gradient, gradient], 1) * 1e3, torch.cat([x, -x], 1)
    part = Product(left, right, [slice(0, 12)])
    score = torch.zeros(64)
    add_squares(score, [part], [1.0], score.device, ChannelLayout(1, 64, 64, 1))
    assert (score >= 0).all()
