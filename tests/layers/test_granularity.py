"""What an input channel is, for every kind of module: all weights that read one input feature."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_child.layers.granularity import layout_of


class Experts(nn.Module):
    """Three experts in one tensor; a subclass stores them transposed."""

    is_transposed = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))


class TransposedExperts(Experts):
    is_transposed = True


KINDS = {  # a module, an input, and the input feature that is read by channel 1
    "linear": (nn.Linear(4, 5), torch.randn(2, 4), (slice(None), 1)),
    "conv1d of gpt2": (Conv1D(5, 4), torch.randn(2, 4), (slice(None), 1)),
    "convolution": (nn.Conv2d(3, 5, 2), torch.randn(2, 3, 4, 4), (slice(None), 1)),
    "groups": (nn.Conv2d(4, 4, 2, groups=2), torch.randn(2, 4, 4, 4), (slice(None), [1, 3])),
    "transposed convolution": (nn.ConvTranspose2d(3, 5, 2), torch.randn(2, 3, 4, 4), (slice(None), 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_is_what_reads_one_input_feature(kind):
    module, x, feature = KINDS[kind]
    layout = layout_of(module, "weight", module.weight)
    assert layout.numel == module.weight.numel()
    alone = torch.zeros_like(x)
    alone[feature] = x[feature]  # all other features are zero
    module(alone).square().sum().backward()
    read = module.weight.grad.flatten().nonzero().flatten()
    assert torch.equal(read, layout.positions(torch.tensor([1])))


def test_a_channel_of_an_embedding_is_a_token():
    module = nn.Embedding(6, 4)
    module(torch.tensor([2, 2])).sum().backward()
    layout = layout_of(module, "weight", module.weight)
    assert torch.equal(module.weight.grad.flatten().nonzero().flatten(), layout.positions(torch.tensor([2])))


@pytest.mark.parametrize("kind", [Experts, TransposedExperts])
def test_a_channel_of_experts_is_one_feature_of_one_of_them(kind):
    module = kind()
    layout = layout_of(module, "weight", module.weight)
    wanted = torch.zeros(3, 5, 4)
    if kind is Experts:
        wanted[1, :, 2] = 1
        number = 1 * 4 + 2
    else:
        wanted[1, 2] = 1
        number = 1 * 5 + 2
    assert torch.equal(wanted.flatten().nonzero().flatten(), layout.positions(torch.tensor([number])))


def test_a_bias_is_one_channel_and_entries_of_a_norm_are_channels_of_their_own():
    norm = nn.LayerNorm(4)
    assert (layout_of(norm, "bias", norm.bias).number, layout_of(norm, "weight", norm.weight).number) == (1, 4)
    scalar = nn.Parameter(torch.tensor(1.0))
    assert layout_of(norm, "scale", scalar).numel == 1
