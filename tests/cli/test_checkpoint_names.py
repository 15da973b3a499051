"""Child networks in the tensors of a checkpoint that transformers renames, fuses or turns on loading."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from peft_child.cli.checkpoint_names import in_checkpoint_names
from peft_child.files.adapter_folder import read_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import NamesDifferError, merge_checkpoint
from peft_child.files.patch import open_patch

from ..files.test_operations import bits, tensors_of
from ..helpers import assert_same, chosen_model, move
from ..problems import build, tiny_llama
from .commands import error_of, run


def saved_mixtral(folder):
    build("mixtral").save_pretrained(folder)
    return chosen_model("mixtral", AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM")


def saved_qwen(folder):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 4}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, **heads)).save_pretrained(folder)
    targets = {
        "target_modules": ["q_proj", "gate"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    return chosen_model("llama", AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM", **targets)


@pytest.mark.parametrize("save", [saved_mixtral, saved_qwen])
def test_the_patch_of_a_fused_model_gives_the_checkpoint_of_the_merged_one(tmp_path, save, granularity):
    model = save(tmp_path / "base")
    move(model)
    model.save_pretrained(tmp_path / "child")
    result = run("patch", tmp_path / "child", tmp_path / "base", tmp_path / "patch.safetensors")
    assert result.exit_code == 0
    assert "or the adapter belongs to another model. The patch gets the names of the checkpoint.\n" in result.stderr
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tensors = {name: tensor.clone() for name, tensor in tensors_of(tmp_path / "base").items()}
    patch = open_patch(tmp_path / "patch.safetensors")
    assert any(".experts.0." in name for name in patch.tensors)
    for name, part in patch.tensors.items():
        tensors[name].view(-1)[part.indices] = part.values
    assert_same(bits(tensors), bits(tensors_of(tmp_path / "merged")))
    # The same change merged as it is streamed.
    adapter, base = read_adapter(tmp_path / "child"), Checkpoint(tmp_path / "base")
    merge_checkpoint(in_checkpoint_names(adapter, base), base, tmp_path / "streamed")
    assert_same(bits(tensors_of(tmp_path / "streamed")), bits(tensors_of(tmp_path / "merged")))


def test_a_prefix_that_the_checkpoint_lacks(tmp_path):
    LlamaModel(tiny_llama(tie_word_embeddings=True).config).save_pretrained(tmp_path / "base")
    model = chosen_model("llama", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    move(model)
    model.save_pretrained(tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    renamed = in_checkpoint_names(adapter, Checkpoint(tmp_path / "base"))
    assert [f"model.{name}" for name in renamed.deltas] == list(adapter.deltas)
    for name, delta in renamed.deltas.items():
        assert torch.equal(delta.indices, adapter.deltas[f"model.{name}"].indices)
        assert torch.equal(delta.values, adapter.deltas[f"model.{name}"].values)


def test_what_does_not_fit(files, tmp_path):
    model = saved_mixtral(tmp_path / "base")
    move(model)
    model.save_pretrained(tmp_path / "child")
    other = build("mixtral")
    torch.nn.init.normal_(other.model.layers[0].mlp.experts.down_proj)
    other.save_pretrained(tmp_path / "other")
    adapter = read_adapter(tmp_path / "child")
    with pytest.raises(ValueError, match="are not those that the adapter was made on"):
        in_checkpoint_names(adapter, Checkpoint(tmp_path / "other"))
    with pytest.raises(NamesDifferError, match=r"Neither the model nor .*base' has 'model\.layers\.0\.mlp\.down_proj"):
        in_checkpoint_names(read_adapter(files / "chosen"), Checkpoint(tmp_path / "base"))
    arguments = [tmp_path / "child", files / "base", tmp_path / "patch.safetensors"]
    assert "Neither the model nor" in error_of("patch", *arguments)
    assert not (tmp_path / "patch.safetensors").exists()
