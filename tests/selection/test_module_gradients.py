"""Gradients of single examples, for every kind of module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..problems import Twice
from .test_batch_scorer import Head, adapted, check, floats, passes_at_once, reasons


class Scale(nn.Module):
    """A module of no known kind, with a weight and a matrix that is not most of the model."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.mix = nn.Parameter(torch.randn(2, width))

    def forward(self, x):
        return x * self.weight * self.mix.sum(0)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return torch.relu_(self.second(torch.relu_(self.first(x)))) + 1


class Flattened(nn.Module):
    """Tokens of all examples in the first dimension, as in routers and in models for multiple choice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x.reshape(-1, 6)).view_as(x)


class Positions(nn.Module):
    """One row of positions serves every example."""

    def __init__(self):
        super().__init__()
        self.table, self.shift, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        positions = self.shift(self.table(torch.arange(x.shape[1]).unsqueeze(0)))
        return self.out(torch.tanh(x + positions))


class Tied(nn.Module):
    """An embedding with a padding row whose table is the output layer as well."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 6, **options), nn.Linear(6, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(torch.tanh(self.table(x)))


def words(*shape, low=0):
    return {"x": torch.randint(low, 9, shape), "labels": torch.randn(*shape, 9)}


def pictures(*shape):
    return {"x": torch.randn(shape), "labels": torch.randn(shape[0], 4)}


def convolution(kind, width, **options):
    return nn.Sequential(kind(2, 4, 3, **options), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * width, 4))


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3)), lambda: floats(6, 6)),
    "linear, many tokens": (lambda: nn.Sequential(nn.Linear(6, 3)), lambda: floats(6, 2, 5, 6)),
    "conv1d": (lambda: nn.Sequential(Conv1D(8, 6), nn.Tanh(), Conv1D(3, 8)), lambda: floats(6, 7, 6)),
    "twice": (Twice, lambda: floats(6, 6, width=6)),
    "twice, many tokens": (Twice, lambda: floats(6, 5, 6, width=6)),
    "in place": (InPlace, lambda: floats(6, 6, width=4)),
    "flattened": (Flattened, lambda: floats(6, 5, 6, width=6)),
    "positions": (Positions, lambda: floats(6, 5, 6)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), lambda: floats(6, 5, 6)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((5, 6)), lambda: floats(6, 5, 6, width=6)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3)), lambda: floats(6, 5, 6)),
    "group norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)), lambda: floats(6, 6)),
    "unknown": (lambda: nn.Sequential(nn.Linear(6, 8), Scale(8), nn.Linear(8, 3)), lambda: floats(6, 5, 6)),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), lambda: floats(6, 6)
    ),
    "convolution": (lambda: convolution(nn.Conv2d, 16, padding=1), lambda: pictures(6, 2, 4, 4)),
    "one-dimensional": (lambda: convolution(nn.Conv1d, 2, groups=2), lambda: pictures(6, 2, 4)),
    "three-dimensional": (lambda: convolution(nn.Conv3d, 1, dilation=2), lambda: pictures(6, 2, 5, 5, 5)),
    "circular": (
        lambda: convolution(nn.Conv2d, 16, padding=1, padding_mode="circular"), lambda: pictures(6, 2, 4, 4)
    ),
    "same": (lambda: convolution(nn.Conv2d, 16, padding="same"), lambda: pictures(6, 2, 4, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=2), nn.Linear(6, 9)), lambda: words(6, 5)),
    "tied": (lambda: Tied(padding_idx=2), lambda: words(6, 5)),
    "embedding by frequency": (
        lambda: nn.Sequential(nn.Embedding(9, 6, scale_grad_by_freq=True), nn.Linear(6, 9)), lambda: words(6, 5)
    ),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 9)), lambda: words(6, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module(kind, caplog):
    body, data = KINDS[kind]
    model = adapted(Head(body(), F.mse_loss), target_modules=["body"])
    batches = [data() for _ in range(3)]
    check(model, batches, passes_at_once(batches))
    assert not reasons(caplog)
