"""How the loss of a batch weighs its examples."""

import pytest
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from ..helpers import config_for
from ..problems import build
from .test_batch_scorer import LENGTHS, Head, adapted, check, floats, padded, passes_at_once, reasons


LOSSES = {
    "mean": lambda output, labels: F.mse_loss(output, labels),
    "sum": lambda output, labels: F.mse_loss(output, labels, reduction="sum"),
    "a sum of means": lambda output, labels: (output - labels).square().mean(-1).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_means_and_sums(loss, caplog):
    model = adapted(Head(nn.Linear(6, 3), LOSSES[loss]), target_modules=["body"])
    batches = [floats(6, 6) for _ in range(3)]
    check(model, batches, passes_at_once(batches))
    assert not reasons(caplog)


@pytest.mark.parametrize("name", ["bert", "bert_parameters"])
def test_padding(name, caplog):
    model = get_peft_model(build(name), config_for(name))
    batches = list(padded(LENGTHS, "class"))
    check(model, batches, passes_at_once(batches))
    assert not reasons(caplog)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2_tied", "llama_embedding", "llama_tied_head"])
def test_means_over_the_tokens_of_causal_language_models(name, caplog):
    model = get_peft_model(build(name), config_for(name))
    batches = list(padded(LENGTHS))
    check(model, batches, passes_at_once(batches))
    assert not reasons(caplog)


def test_means_over_tokens_that_predict_themselves(caplog):
    model = get_peft_model(build("t5"), config_for("t5"))
    batches = list(padded(LENGTHS))
    check(model, batches, passes_at_once(batches))
    assert not reasons(caplog)


def test_weights_that_the_first_batches_cannot_tell_apart_are_compared_again(caplog):
    model = get_peft_model(build("llama"), config_for("llama"))
    alike = [{key: value[:, :4] for key, value in batch.items()} for batch in padded([6] * 6)]
    batches = [*alike, *padded(LENGTHS)]
    check(model, batches, passes_at_once(batches, compared=2))
    assert not reasons(caplog)


def test_a_sum_over_tokens(caplog):
    def loss(output, batch):
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="sum")

    model = get_peft_model(build("llama"), config_for("llama"))
    batches = list(padded(LENGTHS))
    check(model, batches, passes_at_once(batches), loss_fn=loss)
    assert not reasons(caplog)
