"""What the tuner does beyond PEFT: several adapters at once, combined, merged and refused."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_child import (
    ChildTuningConfig,
    select_child_network,
)
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move, snapshot
from ..problems import batch_of, build
from .test_state_dict import trained


def test_one_configuration_serves_many_models():
    config = config_for("llama")
    children = []
    for _ in range(2):
        model = get_peft_model(build("llama"), config)
        select_child_network(model, [batch_of("llama")], progress_bar=False)
        children.append(child_of(model))
    assert_same(*children)
    assert config.child_sizes is None


def two_adapters():
    model = get_peft_model(build("llama"), config_for("llama", variant="random", init_weights=False))
    other = config_for("llama", variant="random", init_weights=False, seed=1, target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", other)
    return model


def test_combining_adapters_of_a_model(tmp_path):
    model = two_adapters()
    batch = batch_of("llama")
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["second"], [1.0], "same")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, batch), both, rtol=1e-5, atol=1e-6)
    result = logits(model, batch)
    model.set_adapter("second")
    second = logits(model, batch)
    model.set_adapter("same")
    assert torch.equal(logits(model, batch), second)
    assert_same(child_of(model, "same"), child_of(model, "second"))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "sum", check_base="error")
    assert torch.equal(logits(loaded, batch), result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0, 2.0], "x"), "Every adapter needs one weight, got 1 adapters and 2 weights"),
        ((["default", "typo"], [1.0, 2.0], "x"), "There is no adapter 'typo'"),
        ((["default"], [1.0], "second"), "already has a Child-Tuning adapter named 'second'"),
        ((["default"], [1.0], "x", "svd"), "combination_type must be one of linear"),
        ((["default"], [1.0], "x", "ties", 1.5), r"density must be a number in \(0, 1\], got 1.5"),
    ],
)
def test_combinations_that_are_refused_change_nothing(arguments, message):
    model = two_adapters()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert_same(snapshot(model), before)
    assert list(model.peft_config) == ["default", "second"]


def test_combining_an_adapter_that_has_not_been_chosen_is_refused():
    model = chosen_model("llama", variant="random")
    model.add_adapter("open", config_for("llama"))
    with pytest.raises(RuntimeError, match=r"'open' has not been chosen: .* before combining"):
        model.add_weighted_adapter(["default", "open"], [1.0, 1.0], "both")
    assert list(model.peft_config) == ["default", "open"]


def test_combining_where_one_name_ends_another():
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model = get_peft_model(base, ChildTuningConfig(variant="random", density=0.5, target_modules="0"))
    assert child_of(model).keys() == {"0.weight", "0.bias"}
    model.add_weighted_adapter(["default"], [1.0], "same")
    assert_same(child_of(model, "same"), child_of(model))


def test_merging_twice_warns_and_an_unknown_adapter_is_refused():
    model = trained("linear")
    model.merge_adapter()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="There is no adapter 'other'; there are default"):
        model.merge_adapter(["other"])
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_what_each_layer_has_active_is_merged(method):
    model = trained("bert")
    model.add_adapter("other", config_for("bert", variant="random", modules_to_save=None))
    move(model, adapter_name="other")
    layers = child_tuning_layers(model).values()
    for number, layer in enumerate(layers):
        layer.set_adapter([["default"], ["other"], ["default", "other"]][number % 3])
    expected = logits(model, batch_of("bert"))
    merged = getattr(model, method)() or model
    assert torch.equal(logits(merged, batch_of("bert")), expected)


def test_an_existing_adapter_name_is_refused_and_nothing_changes(tmp_path):
    base = build("linear")
    model = chosen_model("linear", base)
    before, config = snapshot(model), model.peft_config["default"]
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", config_for("linear"))
    with pytest.raises(ValueError, match="already has a Child-Tuning adapter named 'default'"), pytest.warns():
        get_peft_model(base, config_for("linear"))
    assert model.peft_config["default"] is config
    assert_same(snapshot(model), before)


def test_injection_from_a_state_dict():
    model = trained("llama")
    state = peft.get_peft_model_state_dict(model)
    config = copy.deepcopy(model.peft_config["default"])
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    with pytest.warns(RuntimeWarning, match="contained these additional target modules"):  # those without a child
        base = peft.inject_adapter_in_model(config, build("llama"), state_dict=bare)
    peft.set_peft_model_state_dict(base, state)
    assert torch.equal(logits(base, batch_of("llama")), logits(model, batch_of("llama")))


def test_nothing_is_drawn_where_a_file_says_the_child_network(tmp_path, monkeypatch):
    def drawn(*args):
        raise AssertionError("drawn")

    models = {variant: chosen_model("llama", variant=variant) for variant in ("random", "task_free")}
    for variant, model in models.items():
        move(model)
        model.save_pretrained(tmp_path / variant)
    monkeypatch.setattr("peft_child.tuner.model.drawn_children", drawn)
    monkeypatch.setattr("peft_child.tuner.model.drawn_child", drawn)
    for variant, model in models.items():
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path / variant)
        assert_same(snapshot(loaded), snapshot(model))


RANDOM = {"entries": {}, "channels": {"granularity": "input_channel"}, "task_free": {"variant": "task_free"}}


@pytest.mark.parametrize("first_use", ["forward", "state_dict", "saving"])
@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_child_network_is_drawn_when_no_file_comes(tmp_path, kind, first_use):
    """The configuration of a file is also a configuration for a new adapter."""
    model = chosen_model("llama", **{"variant": "random", **RANDOM[kind]})
    model.save_pretrained(tmp_path)
    again = get_peft_model(build("llama"), ChildTuningConfig.from_pretrained(tmp_path))
    if first_use == "forward":
        logits(again, batch_of("llama"))
    if first_use == "saving":
        again.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    assert_same(snapshot(again), snapshot(model))
    assert_same(child_of(again), child_of(model))


@pytest.mark.parametrize("kind", RANDOM)
def test_what_was_drawn_late_can_be_replaced(tmp_path, kind):
    """Also where it was drawn in inference mode; without values, on meta, nothing is drawn."""
    model = chosen_model("llama", **{"variant": "random", **RANDOM[kind]})
    move(model)
    model.save_pretrained(tmp_path / "good")
    again = get_peft_model(build("llama"), ChildTuningConfig.from_pretrained(tmp_path / "good"))
    with torch.inference_mode():
        again(**batch_of("llama"))
        again.state_dict()
    again.load_state_dict(model.state_dict())
    assert_same(snapshot(again), snapshot(model))
    on_meta = get_peft_model(build("llama").to("meta"), ChildTuningConfig.from_pretrained(tmp_path / "good"))
    assert on_meta.state_dict().keys() == snapshot(model).keys()


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"density": 0.6}, 0.6), ({"variant": "task_free"}, 1.0), ({"granularity": "input_channel"}, 0.3)],
)
def test_a_configuration_of_a_file_that_was_changed_is_that_of_a_new_adapter(tmp_path, changes, share):
    chosen_model("llama", variant="random", density=0.3).save_pretrained(tmp_path)
    config = ChildTuningConfig.from_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(config, name, value)
    model = get_peft_model(build("llama"), config)
    expected = chosen_model("llama", **{"variant": "random", "density": 0.3, **changes})
    logits(model, batch_of("llama"))
    assert_same(child_of(model), child_of(expected))
    targeted = sum(layer.base_parameter(key).numel() for layer, key in targets_of(model))
    assert abs(sum(map(len, child_of(model).values())) / targeted - share) < 0.01


def targets_of(model):
    return [(layer, key) for layer in child_tuning_layers(model).values() for key in layer.targets_of("default")]


def test_an_injected_model_refers_to_no_parameter_but_its_own():
    """FSDP2 replaces parameters; whoever refers to the earlier ones keeps a whole model in memory."""
    model = chosen_model("linear", variant="random")
    freed = [weakref.ref(parameter) for parameter in model.parameters()]
    for module in list(model.modules()):
        for name in list(module._parameters):
            module._parameters[name] = None
    gc.collect()
    assert freed
    assert not any(reference() is not None for reference in freed)
