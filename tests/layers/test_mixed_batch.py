"""Rows of one batch with different adapters, equal to one call for each adapter."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig
from peft_child.layers.layer import child_tuning_layers
from peft_child.layers.mixed_batch import BASE

from ..helpers import chosen_model, config_for, logits, move
from ..problems import Regression, batch_of


ROWS = ["default", BASE, "second", "default", "second", BASE, BASE]


def with_two(name, **changes):
    """A model with two adapters, of which the second one targets fewer modules."""
    model = chosen_model(name, variant="random", **changes)
    model.add_adapter("second", config_for(name, variant="random", seed=1, **changes))
    for number, adapter in enumerate(("default", "second")):
        torch.manual_seed(number)
        move(model, adapter_name=adapter)
    return model.eval()


def many(name):
    """A batch with a row for each of `ROWS`."""
    batch = batch_of(name)
    return {key: torch.cat([value] * 4)[: len(ROWS)] for key, value in batch.items()}


def alone(model, batch, adapter):
    """The logits with one adapter, or with none."""
    if adapter == BASE:
        with model.disable_adapter():
            return logits(model, batch)
    model.set_adapter(adapter)
    return logits(model, batch)


@pytest.mark.parametrize("name", ["linear", "bert", "llama", "gpt2_tied", "conv2d"])
def test_every_row_is_run_with_its_adapter(name, granularity):
    model, batch = with_two(name), many(name)
    with torch.no_grad():
        found = model(**batch, adapter_names=ROWS).logits
    for adapter in dict.fromkeys(ROWS):
        rows = [row for row, other in enumerate(ROWS) if other == adapter]
        torch.testing.assert_close(found[rows], alone(model, batch, adapter)[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone(model, batch, "default"), alone(model, batch, "second"))
    assert all(layer.mixed_batch is None for layer in child_tuning_layers(model).values())


def test_rows_of_one_adapter_are_run_in_one_call():
    model, batch = with_two("llama"), many("llama")
    with torch.no_grad():
        found = model(**batch, adapter_names=["second"] * len(ROWS)).logits
    assert torch.equal(found, alone(model, batch, "second"))


def test_a_layer_runs_the_rows_of_adapters_that_it_does_not_have_together():
    model = chosen_model("llama", variant="random")
    model.add_adapter("second", config_for("llama", variant="random", target_modules=["v_proj"]))
    move(model, adapter_name="second")
    calls = []
    layer = child_tuning_layers(model.eval())["base_model.model.model.layers.0.mlp.up_proj"]
    layer.base_layer.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    with torch.no_grad():
        found = model(**many("llama"), adapter_names=ROWS).logits
    assert sorted(calls) == [2, 5]
    rows = [row for row, name in enumerate(ROWS) if name == "second"]
    torch.testing.assert_close(found[rows], alone(model, many("llama"), "second")[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams):
    model = with_two("llama", task_type="CAUSAL_LM")
    prompts = torch.randint(2, 50, (len(ROWS), 4))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=prompts, adapter_names=ROWS, **options)
    for row, adapter in enumerate(ROWS):
        prompt = {"input_ids": prompts[row : row + 1]}
        if adapter == BASE:
            with model.disable_adapter():
                expected = model.generate(**prompt, **options)
        else:
            model.set_adapter(adapter)
            expected = model.generate(**prompt, **options)
        assert torch.equal(found[row : row + 1], expected)


def test_heads_that_are_saved_whole():
    model = with_two("bert", task_type="SEQ_CLS")
    for number, adapter in enumerate(("default", "second")):
        head = model.base_model.model.classifier.modules_to_save[adapter]
        nn.init.constant_(head.weight, number + 1.0)
    batch = {key: value for key, value in many("bert").items() if key != "labels"}
    with torch.no_grad():
        found = model(**batch, adapter_names=ROWS).logits
    for adapter in ("default", "second", BASE):
        rows = [row for row, other in enumerate(ROWS) if other == adapter]
        torch.testing.assert_close(found[rows], alone(model, batch, adapter)[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("prepare", "names", "message"),
    [
        (nn.Module.train, ROWS, "Cannot pass `adapter_names` when the model is in training mode."),
        (nn.Module.eval, ["default"] * 6 + ["typo"], r"Trying to infer with non-existing adapter\(s\): typo"),
        (nn.Module.eval, ROWS[:-1], "Length of `adapter_names` should be the same as .* got 6 and 7 respectively."),
        (lambda model: model.merge_adapter(), ROWS, "Cannot pass `adapter_names` when there are merged adapters"),
    ],
)
def test_what_cannot_be_run_row_by_row(prepare, names, message):
    model, batch = with_two("llama"), many("llama")
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(**batch, adapter_names=names)
    assert all(layer.mixed_batch is None for layer in child_tuning_layers(model).values())


def test_a_weight_that_is_read_without_a_call_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.inner.weight.T

    config = ChildTuningConfig(variant="random", density=0.5, target_modules=["body.inner"], init_weights=False)
    model = get_peft_model(Regression(Reads()), config).eval()
    batch = {"x": torch.randn(2, 4), "labels": torch.randn(2, 4)}
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="used without a call of its module"):
            model(**batch, adapter_names=["default", BASE])
        model(**batch)
