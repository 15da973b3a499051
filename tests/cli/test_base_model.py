"""Base models that have to be loaded, since their checkpoints have other names."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
)

from peft_child.files.adapter_folder import CONFIG_NAME

from ..files.test_operations import bits, tensors_of
from ..helpers import assert_same, chosen_model, move
from ..problems import build, tiny_bert, tiny_llama
from .commands import error_of, run


def fused(folder):
    """Each expert has tensors of its own in the checkpoint; all of them together are one in the model."""
    build("mixtral").save_pretrained(folder)
    return chosen_model("mixtral", AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM")


def without_head(folder):
    """The checkpoint's names lack the prefix of the model's."""
    LlamaModel(tiny_llama(tie_word_embeddings=True).config).save_pretrained(folder)
    return chosen_model("llama", LlamaForCausalLM.from_pretrained(folder))


def with_new_head(folder):
    """The head is in the adapter alone."""
    BertModel(tiny_bert().config).save_pretrained(folder)
    return chosen_model("bert", AutoModelForSequenceClassification.from_pretrained(folder))


def with_more_classes(folder):
    """The head in the adapter tells more classes apart than a model has by default."""
    BertModel(tiny_bert().config).save_pretrained(folder)
    return classifier(folder)


def with_other_classes(folder):
    """The head in the adapter tells more classes apart than that of the checkpoint, whose names lack the prefix."""
    tiny_bert().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name.removeprefix("bert."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return classifier(folder)


def with_a_head(folder):
    """The checkpoint is a classifier, of fewer classes."""
    tiny_bert().save_pretrained(folder)
    return classifier(folder)


def without_labels(folder):
    """An earlier version made the adapter, and recorded no labels."""
    model = with_more_classes(folder)
    model.peft_config["default"].record_labels = lambda config: None
    return model


def classifier(folder):
    """An adapter for three classes."""
    labels = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(folder, **labels)
    return chosen_model("bert", base, task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fused, "or the adapter belongs to another model."),
        (without_head, "the names of the checkpoint lack the prefix 'model.' of the model."),
        *((make, "lack the prefix 'bert.' of the model.") for make in (with_new_head, with_more_classes)),
        *((make, "lack the prefix 'bert.' of the model.") for make in (with_other_classes, without_labels)),
        (with_a_head, "in the adapter, which has it whole: the adapter has another head."),
    ],
)
def test_merge_loads_the_model_where_names_differ(tmp_path, make, reason):
    model = make(tmp_path / "base")
    (tmp_path / "base/tokenizer.txt").write_text("beside the weights")
    move(model)
    model.save_pretrained(tmp_path / "child")
    for what, arguments in (
        ("check", ("--base", tmp_path / "base")),
        ("merge", (tmp_path / "base", tmp_path / "merged")),
    ):
        result = run("verify" if what == "check" else "merge", tmp_path / "child", *arguments)
        assert result.exit_code == 0
        assert result.stderr.startswith("note: '")
        assert result.stderr.endswith(f"{reason} The whole model is loaded to {what} it.\n")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tensors_of(tmp_path / "expected")))
    assert (tmp_path / "merged/tokenizer.txt").read_text() == "beside the weights"
    settings = json.loads((tmp_path / "merged/config.json").read_text())
    if make is not without_labels:  # the numbers alone are right there
        expected = json.loads((tmp_path / "expected/config.json").read_text())
        assert settings.get("id2label") == expected.get("id2label")
    assert settings["architectures"] == [type(merged).__name__]
    assert not list(tmp_path.glob(".*"))


def test_a_merged_classifier_has_the_labels_of_the_adapter(tmp_path):
    BertForSequenceClassification(tiny_bert().config).save_pretrained(tmp_path / "base")
    labels = {0: "different", 1: "same"}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=labels)
    chosen_model("bert", base, task_type="SEQ_CLS").save_pretrained(tmp_path / "child")
    assert run("merge", tmp_path / "child", tmp_path / "base", tmp_path / "merged").exit_code == 0
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.id2label == labels
    assert merged.label2id == {"different": 0, "same": 1}


def test_parts_that_a_checkpoint_lacks_are_named_as_such(tmp_path):
    BertModel(tiny_bert().config, add_pooling_layer=False).save_pretrained(tmp_path / "headless")
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(tmp_path / "headless/model.safetensors").items()}
    save_file(tensors, tmp_path / "headless/model.safetensors", {"format": "pt"})
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "headless")
    chosen_model("bert", base, task_type="SEQ_CLS").save_pretrained(tmp_path / "child")
    message = run("verify", tmp_path / "child", "--base", tmp_path / "headless").stderr
    assert "the checkpoint lacks some parts of the model, such as a new head." in message


def test_a_head_that_nobody_has_is_not_made_up(tmp_path):
    LlamaModel(tiny_llama().config).save_pretrained(tmp_path / "base")
    model = chosen_model("llama", LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "child")
    message = error_of("merge", tmp_path / "child", tmp_path / "base", tmp_path / "merged")
    assert "lacks 'lm_head.weight' (1 tensors in all), and the adapter does not have it" in message
    assert not (tmp_path / "merged").exists()


def test_a_model_that_cannot_be_loaded(files, tmp_path):
    build("bert").save_pretrained(tmp_path / "bert")
    for base, problem in (
        (tmp_path / "bert", "does not fit"),
        (tmp_path / "bert/model.safetensors", "must be a folder with 'config.json'"),
    ):
        assert problem in error_of("merge", files / "chosen", base, tmp_path / "merged")
        assert problem in error_of("verify", files / "chosen", "--base", base)
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((tmp_path / "child" / CONFIG_NAME).read_text())
    settings.update(task_type=None, auto_mapping={"base_model_class": "Trainer", "parent_library": "os"})
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps(settings))
    message = error_of("merge", tmp_path / "child", tmp_path / "bert", tmp_path / "merged")
    assert "transformers has no model class 'Trainer'" in message
