"""The loss of a batch, wherever it is."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_child import ChildTuningConfig

from ..helpers import assert_same, child_of
from ..problems import batch_of
from .test_select import chosen, scored, unchosen


def test_tuples_with_a_forward_fn_and_a_loss_fn():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ChildTuningConfig(density=0.5, target_modules=["0"]))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    loss = nn.functional.mse_loss
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    whole = scored(model, loader, forward_fn=lambda model, batch: loss(model(batch[0]), batch[1]))
    split = scored(
        model,
        loader,
        forward_fn=lambda model, batch: model(batch[0]),
        loss_fn=lambda output, batch: loss(output, batch[1]),
    )
    assert_same(whole, split)
    with pytest.raises(
        ValueError, match=r"Batches must be mappings of tensors .* got a list\. For.*pass a forward_fn"
    ):
        scored(model, loader)


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss}, lambda loss: (loss, None), lambda loss: loss])
def test_outputs_of_every_kind(wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return wrap(self.linear(x).square().sum())

    model = get_peft_model(Model(), ChildTuningConfig(target_modules=["linear"]))
    assert chosen(model, [{"x": torch.randn(2, 4)}])


def test_a_loss_that_depends_on_no_target():
    model = unchosen("linear")
    batch = [batch_of("linear")]
    with pytest.raises(ValueError, match="No score is positive"):
        chosen(model, batch, loss_fn=lambda output, batch: output.loss * 0)
    with pytest.raises(ValueError, match="loss of example 0 does not depend on any targeted weight"):
        chosen(model, batch, loss_fn=lambda output, batch: output.loss.detach())
    assert not child_of(model)


def test_a_loss_that_is_not_finite_names_the_example():
    batch = batch_of("linear")
    batch["labels"][2, 0] = float("nan")
    with pytest.raises(ValueError, match="that of example 2 is nan"):
        chosen(unchosen("linear"), [batch])
