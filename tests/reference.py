"""The method and its parts spelled out, with no regard for memory or time."""

from __future__ import annotations

import copy

import torch


def fisher(model, examples, names):
    """Mean over examples of the squared gradient of each example's loss, for the named parameters of a plain model."""
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = [parameters[name].requires_grad_(True) for name in names]
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in wanted]
    for example in examples:
        gradients = torch.autograd.grad(model(**example).loss, wanted, allow_unused=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                sum_ += gradient.double() ** 2
    return {name: (sum_ / len(examples)).float() for name, sum_ in zip(names, total, strict=True)}


def largest(scores, size):
    """A stable sort of all scores joined."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[:size]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}


def masked_training(model, child, batches, make_optimizer, accumulation=1, draw=None):
    """Full fine-tuning of a plain model with the gradient set to zero outside the child network.

    Args:
        model: The base model; it is copied.
        child: Flat indices by parameter name.
        batches: One for each forward pass.
        make_optimizer: From a list of parameters.
        accumulation: Forward passes for each optimizer step.
        draw: What to multiply the gradient with besides, by optimizer step, name and number of entries.
    """
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, indices in child.items():
        parameter = parameters[name].requires_grad_(True)
        mask = torch.zeros_like(parameter).view(-1).index_fill(0, indices, 1).view_as(parameter)
        trained.append((name, parameter, mask))
    optimizer = make_optimizer([parameter for _, parameter, _ in trained])
    for step, batch in enumerate(batches, start=1):
        (model(**batch).loss / accumulation).backward()
        if step % accumulation == 0:
            for name, parameter, mask in trained:
                parameter.grad *= mask
                if draw is not None:
                    parameter.grad *= draw(step // accumulation - 1, name, parameter.numel()).view_as(parameter)
            optimizer.step()
            optimizer.zero_grad()
    return model
