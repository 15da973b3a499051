"""Which parameters an adapter targets, and what is refused before anything has changed."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
)

from peft_child import ChildTuningConfig, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, config_for, snapshot
from ..problems import Output, Regression, batch_of, build, tiny_bert


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.mark.parametrize(
    ("task", "model", "head", "targets"),
    [
        ("TOKEN_CLS", BertForTokenClassification, "classifier", ["query"]),
        ("QUESTION_ANS", BertForQuestionAnswering, "qa_outputs", ["query"]),
        ("SEQ_CLS", None, "classifier", ["query"]),
        ("SEQ_CLS", None, "classifier", "all-linear"),
    ],
)
def test_task_types_train_their_heads(task, model, head, targets, tmp_path):
    base = model(BertConfig(**SMALL)) if model else tiny_bert()
    fresh = copy.deepcopy(base)
    config = ChildTuningConfig(variant="random", init_weights=False, target_modules=targets, task_type=task)
    model = get_peft_model(base, config)
    assert [key for key, value in model.named_parameters() if value.requires_grad and head in key]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    ids = {"input_ids": torch.randint(0, 50, (2, 5))}
    with torch.no_grad():
        assert torch.equal(model.eval()(**ids)[0], loaded.eval()(**ids)[0])


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained")
@pytest.mark.parametrize("name", ["a.b", "", "keys", "forward"])
def test_adapter_names_that_no_module_can_have(name):
    base = build("linear")
    with pytest.raises(ValueError, match="adapter_name must be a name that a module can have"):
        get_peft_model(base, config_for("linear"), adapter_name=name)
    assert not child_tuning_layers(base)


def test_a_refused_second_adapter_leaves_its_name_free():
    base = tiny_bert()
    model = get_peft_model(base, ChildTuningConfig(variant="random", target_modules=["classifier", "query"]))
    before = snapshot(model)
    with pytest.raises(TypeError):
        model.add_adapter(
            "x", ChildTuningConfig(variant="random", target_modules=["query"], modules_to_save=["classifier"])
        )
    assert_same(snapshot(model), before)
    model.add_adapter("x", ChildTuningConfig(variant="random", target_modules=["query"]))
    assert child_of(model, "x")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_other_peft_methods_in_the_same_model_are_refused():
    base = build("llama")
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "low_rank")
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' is a peft.* of another PEFT method"):
        base.add_adapter(config_for("llama"), "child_network")


def test_parameter_lists_are_refused():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(2)])
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"'body.scales.0' is in a ParameterList"):
        get_peft_model(Regression(Listed()), ChildTuningConfig(target_parameters=".*"))


def test_excluding_a_module_takes_away_what_is_inside():
    def children(**targets):
        config = ChildTuningConfig(variant="random", density=1.0, exclude_modules=["layer.0"], **targets)
        return set(child_of(get_peft_model(tiny_bert(), config)))

    for targets in ({"target_parameters": ".*"}, {"target_modules": ["encoder"]}, {"target_modules": "all-linear"}):
        names = children(**targets)
        assert [name for name in names if "layer.1" in name]
        assert not [name for name in names if "layer.0" in name]


def test_one_configuration_object_for_two_adapters_of_one_model():
    config = config_for("linear", variant="random")
    model = get_peft_model(build("linear"), config)
    model.add_adapter("second", config)
    assert_same(child_of(model), child_of(model, "second"))
    assert isinstance(model(**batch_of("linear")), Output)


def test_the_selection_is_recorded_for_one_model_alone(tmp_path):
    config = config_for("linear")
    models = [get_peft_model(build("linear"), config) for _ in range(2)]
    select_child_network(models[0], [batch_of("linear")], num_examples=2, progress_bar=False)
    select_child_network(models[1], [batch_of("linear", 3)], progress_bar=False)
    assert [model.peft_config["default"].fisher_examples for model in models] == [2, 4]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
        loaded = PeftModel.from_pretrained(build("linear"), tmp_path / str(index))
        assert_same(child_of(loaded), child_of(model))


def test_a_parameter_that_no_container_can_hold_is_refused():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Parameter(torch.ones(3, 3))

    base = nn.ModuleDict({"memory": Memory()})
    with pytest.raises(ValueError, match=r"'memory\.keys' has the name of a method"):
        get_peft_model(base, ChildTuningConfig(target_parameters=["memory.keys"]))
    assert isinstance(base["memory"], Memory)
