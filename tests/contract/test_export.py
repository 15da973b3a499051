"""Exported programs compute what the model computes, with the adapter beside the base or merged into it."""

import io

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_child import ChildTuningConfig

from ..helpers import batch_of, build, chosen_model, logits, move


pytestmark = pytest.mark.usefixtures("granularity")


def inputs_of(kind):
    batch = batch_of(kind)
    if "input_ids" in batch:
        batch = {"input_ids": batch["input_ids"]}
    return {**batch, **({"use_cache": False} if kind in {"llama", "gpt2"} else {})}


def trained_model(kind, merged=False):
    model = chosen_model(kind)
    move(model)
    return (model.merge_and_unload() if merged else model).eval()


@pytest.mark.filterwarnings("ignore")  # torch's own, about its exporter
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["linear", "bert", "llama", "gpt2"])
def test_an_exported_model_computes_the_same(kind, strict, merged):
    model, inputs = trained_model(kind, merged), inputs_of(kind)
    expected = logits(model, inputs)
    program = torch.export.export(model, (), inputs, strict=strict).module()
    assert torch.equal(program(**inputs).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [True, False])
def test_a_traced_model_computes_the_same(merged):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).logits

    model = Logits(trained_model("bert", merged)).eval()
    tokens = inputs_of("bert")["input_ids"]
    expected = model(tokens)
    assert torch.equal(saved_and_loaded(torch.jit.trace(model, (tokens,), check_trace=False))(tokens), expected)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_torch_that_hand_weights_to_kernels_can_be_traced(grad):
    base = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    config = ChildTuningConfig(variant="random", density=0.3, target_modules=["linear1", "linear2", "out_proj"])
    model = get_peft_model(base, config).eval()
    move(model)
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        expected = base(x)
        program = saved_and_loaded(torch.jit.trace(base, (x,), check_trace=False))
        assert torch.equal(program(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_never_ran_cannot_be_traced_without_values(tmp_path):
    trained_model("bert").save_pretrained(tmp_path)
    model, inputs = PeftModel.from_pretrained(build("bert"), tmp_path).eval(), inputs_of("bert")
    for layer in model.modules():
        getattr(layer, "clear_cache", lambda: None)()
    with pytest.raises(RuntimeError, match=r"Run the model once before torch.export, or call merge_and_unload\(\)"):
        torch.export.export(model, (), inputs, strict=False)
    expected = logits(model, inputs)
    assert torch.equal(torch.export.export(model, (), inputs, strict=False).module()(**inputs).logits, expected)
