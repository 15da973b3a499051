"""Whole runs on bases that transformers has quantised or kept packed: trainers, generation, and GGUF blocks."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from benchmarks.measure import peak_allocated
from peft_child import ChildTuningConfig, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, logits, train
from ..problems import batch_of
from .test_packed import base_of, dense_twin, gguf, nf4, packed_bits, plain_base, rows


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_once": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=SETTINGS)
def load(request, tmp_path):
    """Loads the tiny Llama quantised by transformers."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: run make quantised")
    plain_base().save_pretrained(tmp_path / "base")

    def loaded():
        config = BitsAndBytesConfig(**SETTINGS[request.param])
        dtype = "bfloat16" if request.param == "nf4_bfloat16" else "float32"
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=dtype)

    return loaded


def config_of(granularity, **changes):
    settings = {"density": 0.3, "granularity": granularity, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return ChildTuningConfig(**settings | changes)


def test_a_run_in_the_trainer(tmp_path, load, granularity):
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, config_of(granularity))
    assert len(child_tuning_layers(model)) == 14
    batch = rows(batch_of("llama"))
    before = packed_bits(base)
    select_child_network(model, [batch], progress_bar=False)
    data = [{name: value[index] for name, value in batch.items()} for index in range(len(batch["labels"]))]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=data * 4).train()
    chosen = [layer for layer in child_tuning_layers(model).values() if layer.named_deltas("default")]
    assert len(chosen) > 3
    assert all(layer.is_trained("default") for layer in chosen)
    assert_same(packed_bits(base), before)

    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, batch)
    assert model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=3).shape[1] == batch["labels"].shape[1] + 3
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load()), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)


def test_supervised_fine_tuning_with_trl(tmp_path, load, granularity):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    batch = rows(batch_of("llama"))
    arguments = trl.SFTConfig(
        str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=load(),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": batch["input_ids"].tolist() * 4}),
        processing_class=tokenizer(),
        peft_config=config_of(granularity, variant="random"),
    )
    trainer.train()
    assert all(layer.is_trained("default") for layer in child_tuning_layers(trainer.model).values())


def tokenizer():
    vocabulary = {f"w{number}": number for number in range(50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


class FakeKernel:
    """In place of the kernel that transformers loads from the Hub for a GPU, without gradients."""

    def supports(self, ggml_type):
        return True

    @torch.no_grad()
    def mul_mat_vec(self, weight, x, ggml_type, out_features):
        from transformers.integrations.gguf import kernels

        unpacked = kernels.dequantize_blocks(weight, ggml_type, out_features, x.shape[-1], torch.float32)
        return functional.linear(x.float(), unpacked)


def test_gguf_blocks_that_stay_packed(monkeypatch, granularity):
    """As transformers keeps them for some architectures, if there is a kernel; it unpacks the others when loading."""
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    monkeypatch.setattr(kernels, "_gguf_kernel", FakeKernel())
    base = base_of(gguf)
    twin, before = dense_twin(base), packed_bits(base)
    batch = rows(batch_of("llama"))
    found = []
    for each in (base, twin):
        model = get_peft_model(each, config_of(granularity, target_modules=["q_proj", "o_proj", "down_proj"]))
        select_child_network(model, [batch], progress_bar=False)
        train(model, [batch] * 3)
        found.append(model)
    assert_same(child_of(found[0]), child_of(found[1]))
    assert_same(packed_bits(base), before)
    few = {"input_ids": batch["input_ids"][:1, :5]}  # on the kernel
    for inputs in (batch, few):
        torch.testing.assert_close(logits(found[0], inputs), logits(found[1], inputs), rtol=0, atol=1e-3)


def test_memory_is_that_of_lora_and_at_most_one_unpacked_layer(granularity):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: run make quantised")
    width, layers, rank = 256, 8, 16
    trained = 2 * rank * width  # in each layer
    peaks = {}
    for method in ("lora", "child"):
        torch.manual_seed(0)
        base = nn.Sequential(*(nf4(nn.Linear(width, width, bias=False)) for _ in range(layers)))
        names = [str(number) for number in range(layers)]
        model = get_peft_model(
            base,
            LoraConfig(target_modules=names, r=rank)
            if method == "lora"
            else config_of(
                granularity, target_modules=names, task_type=None, variant="random", density=trained / width**2
            ),
        )
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], foreach=False)
        assert sum(value.numel() for value in model.parameters() if value.requires_grad) == layers * trained
        x = torch.randn(64, width)

        def step(model=model, optimizer=optimizer, x=x):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        peaks[method] = peak_allocated(step)
    assert peaks["child"] <= peaks["lora"] + 4 * width * width
