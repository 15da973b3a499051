import pytest
import torch
from torch import nn

from peft_child.selection.squares import average, squaring


def diagonal_fisher(parameters, losses, max_norm=None):
    """The mean of the squared gradients of losses."""

    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    count = 0
    for loss in losses:
        with squaring(parameters, sums, max_norm):
            loss.backward()
        count += 1
    average(sums, count, shared=False)
    return sums


def model_and_losses(examples=5):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    inputs = torch.randn(examples, 4)
    return model, lambda: (model(x).square().sum() for x in inputs)


def test_is_the_mean_of_squared_gradients():
    model, losses = model_and_losses()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for loss in losses():
        for name, gradient in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            expected[name] += gradient.square() / 5
    scores = diagonal_fisher(dict(model.named_parameters()), losses())
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clipping_is_by_tensor_and_before_squaring():
    model, losses = model_and_losses(examples=1)
    scores = diagonal_fisher(dict(model.named_parameters()), losses(), max_norm=1e-3)
    for score in scores.values():
        torch.testing.assert_close(score.sum().sqrt(), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_a_sum_over_a_batch_is_not_a_mean_over_examples():
    model, losses = model_and_losses()
    parameters = dict(model.named_parameters())
    apart = diagonal_fisher(parameters, losses())
    together = diagonal_fisher(parameters, [sum(losses())])
    assert not torch.allclose(apart["0.weight"] * 5, together["0.weight"])


def test_low_precision_gradients_are_squared_in_float32():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    scores = diagonal_fisher({"w": weight}, [(weight * 1e-4).sum()])
    assert scores["w"].dtype == torch.float32
    torch.testing.assert_close(scores["w"], torch.full((3,), 1e-8), rtol=1e-3, atol=0)


def test_a_parameter_that_no_loss_reaches_scores_zero():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    scores = diagonal_fisher({"used": used, "unused": unused}, [used.sum()])
    assert scores["unused"].eq(0).all()
    assert scores["used"].eq(1).all()


def test_sparse_gradients():
    embedding = nn.Embedding(5, 2, sparse=True)
    scores = diagonal_fisher({"w": embedding.weight}, [embedding(torch.tensor([1, 1, 3])).sum()])
    assert scores["w"].tolist() == [[0, 0], [4, 4], [0, 0], [1, 1], [0, 0]]


def test_a_gradient_that_is_not_finite():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="The Fisher information of 'w' is not finite"):
        diagonal_fisher({"w": weight}, [(weight * float("inf")).sum()])
    assert weight.grad is None
    assert not weight._post_accumulate_grad_hooks


def test_a_gradient_that_arrives_in_parts_is_refused():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    checkpoint = torch.utils.checkpoint.checkpoint
    loss = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="arrived in parts"):
        diagonal_fisher({"weight": layer.weight}, [loss])
