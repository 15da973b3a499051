"""What hooks capture of a batch gives the gradients of its examples, and leaves nothing behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_child.selection.capture import CannotCaptureError, Owners
from peft_child.selection.example_gradients import add_squares


EXAMPLES = 4


class Model(nn.Module):
    """An embedding and a linear layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return self.linear(torch.tanh(self.linear(self.embedding(ids)))).square().mean()


def targets_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if name != "linear.bias"}


def squares_of(model, ids):
    """By the definition: one example after the other."""
    found = {}
    for row in ids:
        gradients = torch.autograd.grad(model(row[None]), list(targets_of(model).values()))
        for name, gradient in zip(targets_of(model), gradients, strict=True):
            found[name] = found.get(name, 0) + gradient.square()
    return found


def test_squared_gradients_of_the_examples_of_a_batch():
    model, ids = Model(), torch.randint(10, (EXAMPLES, 5))
    expected = squares_of(model, ids)
    targets = targets_of(model.requires_grad_(False))
    scores = {name: torch.zeros_like(parameter) for name, parameter in targets.items()}
    weights = [float(EXAMPLES**2)] * EXAMPLES  # the loss is a mean over examples
    finished = []

    def sink(name, parts):
        finished.append(name)
        add_squares(scores[name], parts, weights, parts[0].of(slice(0, 1), slice(None)).device)

    with Owners(model, targets).capture(EXAMPLES, {1}) as capture:
        capture.backward(model(ids), 1.0, sink)
        assert all(parameter.grad is None for parameter in targets.values())
    assert finished == ["linear.weight", "embedding.weight"]  # as soon as each is complete
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-9)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("rows", "works"), [(1, True), (5, True), (3, False), (0, False)])
def test_rows_that_cannot_be_divided_among_the_examples_are_refused(rows, works):
    linear = nn.Linear(6, 3)
    x = torch.randn(EXAMPLES * rows + (rows == 0) * 7, 6)
    with Owners(linear, {"weight": linear.weight}).capture(EXAMPLES, {1, 5}) as capture:
        if works:
            linear(x)
            assert capture.divisions
        else:
            with pytest.raises(CannotCaptureError, match=r"a Linear should return one tensor.* returns "):
                linear(x)


def test_weights_without_a_formula_are_counted():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.weight.square())

    model = nn.Sequential(nn.Linear(4, 4), Square())
    owners = Owners(model, dict(model.named_parameters()))
    assert owners.to_run_again() == (16, "Square")
