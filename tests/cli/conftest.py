"""Files for all commands."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_child.files.adapter_folder import CONFIG_NAME, WEIGHTS_NAME

from ..files.test_operations import saved_adapter, saved_base
from ..problems import tiny_llama


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, what became of it, another base, a wider one, and adapters of the first."""
    folder = tmp_path_factory.mktemp("files")
    base = saved_base(folder / "base", torch.bfloat16)
    tuned = load_file(base / "model.safetensors")
    for tensor in tuned.values():
        tensor[torch.rand(tensor.shape) < 0.1] *= 1.5
    save_file(tuned, folder / "tuned.safetensors", metadata={"format": "pt"})
    torch.manual_seed(5)
    tiny_llama().bfloat16().save_pretrained(folder / "other")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(folder / "wide")
    saved_adapter(base, folder / "chosen")
    saved_adapter(base, folder / "random", variant="random", seed=1)
    shutil.copytree(folder / "chosen", folder / "lora")
    settings = json.loads((folder / "lora" / CONFIG_NAME).read_text())
    (folder / "lora" / CONFIG_NAME).write_text(json.dumps({**settings, "peft_type": "LORA"}))
    shutil.copytree(folder / "chosen", folder / "damaged")
    damaged = bytearray((folder / "damaged" / WEIGHTS_NAME).read_bytes())
    damaged[-1] ^= 1
    (folder / "damaged" / WEIGHTS_NAME).write_bytes(damaged)
    return folder
