"""Vocabularies that grew before an adapter was made: new rows are in a file, or the adapter is refused at once."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peft_child import ChildTuningConfig

from ..helpers import assert_same, batch_of, logits, move, snapshot
from ..problems import tiny_llama


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def grown(request, tmp_path):
    """A model from a folder whose vocabulary has been resized since."""
    tiny_llama(request.param).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(60, mean_resizing=False)
    return model


def config(**changes):
    settings = {"density": 0.3, "variant": "random", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **changes}
    return ChildTuningConfig(**settings)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_new_rows_that_no_file_would_have_are_refused(grown, target):
    with pytest.raises(ValueError, match=r"' has 60 rows, but '.*base' has 50: .* Save the resized model and load it"):
        get_peft_model(grown, config(target_modules=[target, "q_proj"]))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's, of what it would do itself
def test_the_ways_out_keep_every_bit(grown, tmp_path):
    batch = batch_of("llama")
    grown.save_pretrained(tmp_path / "grown")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "grown")
    model = get_peft_model(again, config(target_modules=["embed_tokens", "q_proj"]))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "grown")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # which PEFT does, and need not
def test_embeddings_that_are_saved_whole_may_have_grown(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    models = [LlamaForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2)]
    for model in models:  # with other new rows each
        model.resize_token_embeddings(60, mean_resizing=False)
    model = get_peft_model(models[0], config(modules_to_save=["embed_tokens", "lm_head"]))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models[1], tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch_of("llama")), logits(model, batch_of("llama")))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_what_has_a_child_network_is_not_resized(target):
    base = tiny_llama()
    model = get_peft_model(base, config(target_modules=[target]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"resized has a child network.*: resize the base model before"):
        model.resize_token_embeddings(60)
    assert_same(snapshot(model), before)
    assert base.config.vocab_size == 50


def test_what_has_no_child_network_is_resized():
    model = get_peft_model(tiny_llama(), config())
    assert model.resize_token_embeddings(60, mean_resizing=False).num_embeddings == 60
    assert logits(model, batch_of("llama")).shape[-1] == 60


def test_embeddings_that_are_not_targeted_may_have_grown(grown):
    assert logits(get_peft_model(grown, config()), batch_of("llama")).shape[-1] == 60
