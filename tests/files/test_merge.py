"""Adapters merged into checkpoints, and their values alone."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_child.files.adapter_folder import read_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import NamesDifferError, merge_checkpoint

from ..helpers import assert_same, logits
from ..problems import batch_of, build, tiny_llama
from .test_operations import bits, saved_adapter, saved_base, tensors_of


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Gradients of float16 weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "4KB"])
def test_merging_files_equals_merging_a_model(tmp_path, dtype, tied, shard_size):
    base = saved_base(tmp_path / "base", dtype, tied, shard_size)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard_size == "4KB")
    model = saved_adapter(base, tmp_path / "child", target_modules=["q_proj", "embed_tokens", "norm"])
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "expected", max_shard_size=shard_size)
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tensors_of(tmp_path / "expected")))
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in base.iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "child")
    assert torch.equal(logits(merged, batch_of("llama")), logits(again, batch_of("llama")))


def test_a_single_file_is_merged_too(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(base, tmp_path / "child")
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base / "model.safetensors"), tmp_path / "merged")
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "whole")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_another_base_is_noticed(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(base, tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    torch.manual_seed(5)
    tiny_llama().save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="are not those that the adapter was made on") as warned:
        merge_checkpoint(adapter, Checkpoint(tmp_path / "other"), tmp_path / "merged")
    assert len(warned) == 1
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"entries in .*wide', but 384 in the adapter"):
        merge_checkpoint(adapter, Checkpoint(tmp_path / "wide"), tmp_path / "no")
    build("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(NamesDifferError, match=r"has no tensor 'model.layers"):
        merge_checkpoint(adapter, Checkpoint(tmp_path / "bert"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
