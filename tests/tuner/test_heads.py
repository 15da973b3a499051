"""Heads of any kind: trained whole, left out of 'all-linear', and put back by merging and unloading."""

import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_child import ChildTuningConfig
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, move, snapshot


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
HEADS = {
    "SEQ_CLS": (RobertaForSequenceClassification, RobertaConfig, "classifier"),
    "TOKEN_CLS": (BertForTokenClassification, BertConfig, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, BertConfig, "qa_outputs"),
}


def built(task, **settings):
    model_class, config_class, _ = HEADS[task]
    torch.manual_seed(0)
    return model_class(config_class(**SIZES, **settings)).eval()


def adapted(task, base, **changes):
    settings = {"density": 0.3, "target_modules": "all-linear", "task_type": task, "variant": "random", **changes}
    return get_peft_model(base, ChildTuningConfig(**settings))


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=torch.arange(2, 18).view(2, 8))
    return torch.cat([value.flatten() for value in found.values()])


@pytest.mark.parametrize("task", HEADS)
def test_a_head_is_merged_and_unloaded_whatever_it_is(task):
    base = built(task)
    before = snapshot(base)
    model = adapted(task, base).eval()
    move(model)
    expected = outputs(model)
    assert torch.equal(outputs(model.merge_and_unload()), expected)
    again = built(task)
    assert_same(snapshot(adapted(task, again).unload()), before)


@pytest.mark.parametrize("target_modules", ["all-linear", ["dense", "query", "classifier", "qa_outputs"]])
@pytest.mark.parametrize("task", HEADS)
def test_nothing_inside_a_module_saved_whole_is_targeted(task, target_modules):
    model = adapted(task, built(task), target_modules=target_modules)
    head = HEADS[task][2]
    named = [name for layer in child_tuning_layers(model).values() for name in layer.targets_of("default").values()]
    assert named
    assert not [name for name in named if head in name]
    assert any(f"{head}.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_module_saved_whole_may_hold_others_that_would_be_targeted(tmp_path):
    model = adapted("TOKEN_CLS", built("TOKEN_CLS"), modules_to_save=["layer.1"])
    names = [name for layer in child_tuning_layers(model).values() for name in layer.targets_of("default").values()]
    assert names
    assert not [name for name in names if "layer.1." in name]
    move(model)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("task", HEADS)
def test_an_adapter_that_is_refused_leaves_the_base_as_it_was(task):
    base = built(task)
    before, kinds = snapshot(base), [type(module) for module in base.modules()]
    with pytest.raises(TypeError, match=r"modules_to_save cannot be applied to .*ModuleList"):
        adapted(task, base, modules_to_save=["encoder.layer"], target_modules=["word_embeddings"])
    assert_same(snapshot(base), before)
    assert [type(module) for module in base.modules()] == kinds


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_labels_are_saved_and_a_base_with_fewer_is_refused(task, tmp_path):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    adapted(task, built(task, id2label=labels)).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).labels == list(labels.values())
    PeftModel.from_pretrained(built(task, id2label=labels), tmp_path)
    with (
        pytest.warns(UserWarning, match="classifier with num_labels=3"),
        pytest.raises(RuntimeError, match="size mismatch"),
    ):
        PeftModel.from_pretrained(built(task), tmp_path)


def test_labels_come_in_the_order_of_their_numbers(tmp_path):
    base = built("SEQ_CLS", num_labels=12)
    base.config.id2label = {str(number): f"class {number}" for number in range(12)}  # as of keyword arguments
    adapted("SEQ_CLS", base).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).labels == [f"class {number}" for number in range(12)]


def test_one_configuration_for_two_tasks(tmp_path):
    config = ChildTuningConfig(target_modules="all-linear", task_type="SEQ_CLS", variant="random")
    models = [get_peft_model(built("SEQ_CLS", num_labels=count), config) for count in (2, 3)]
    for count, model in zip((2, 3), models, strict=True):
        model.save_pretrained(tmp_path / str(count))
    assert config.labels is None
    assert len(PeftConfig.from_pretrained(tmp_path / "2").labels) == 2
    models[0].load_adapter(tmp_path / "2", "again")


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        (("classifier.dense",), "such as 'classifier.dense.weight'. What a checkpoint lacks .* give task_type"),
        (
            ("classifier.dense", "roberta.encoder.layer.0.attention.self.query"),
            "Load the same base model and revision",
        ),
    ],
)
def test_a_head_that_was_not_saved_whole_is_explained(changed, advice, tmp_path):
    adapted(None, built("SEQ_CLS"), target_modules=["query", "dense"]).save_pretrained(tmp_path)
    base = built("SEQ_CLS")
    for name in changed:
        torch.nn.init.ones_(base.get_submodule(name).weight)
    with pytest.warns(UserWarning, match=advice):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(("dtype", "warns"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_a_head_in_float16_is_warned_of(dtype, warns, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(None, built("SEQ_CLS").to(dtype), modules_to_save=["classifier.dense"])
        model = adapted("SEQ_CLS", built("SEQ_CLS").to(dtype))
        assert len([each for each in caught if "is trained whole, and in float16" in str(each.message)]) == 2 * warns
        model.save_pretrained(tmp_path)
        caught.clear()
        PeftModel.from_pretrained(built("SEQ_CLS").to(dtype), tmp_path)
        adapted(None, built("SEQ_CLS").to(dtype))
        assert not [each for each in caught if "float16" in str(each.message)]
