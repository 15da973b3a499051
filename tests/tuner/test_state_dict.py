"""The whole state dict of a trained model in a fresh one, which has chosen nothing, or something else."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.codec import FormatError

from ..files.test_adapter_tensors import read_independently
from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move, snapshot, train
from ..problems import PROBLEMS, batch_of, build


pytestmark = pytest.mark.usefixtures("granularity")


def trained(name, **changes):
    model = chosen_model(name, **changes)
    move(model)
    return model


def fresh(name, **changes):
    return get_peft_model(build(name), config_for(name, **changes))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_whole_state_dict_loads_into_a_fresh_model(name, assign, tmp_path):
    model, loaded = trained(name), fresh(name)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    loaded.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True), assign=assign)
    assert_same(snapshot(model), snapshot(loaded))
    assert_same(child_of(model), child_of(loaded))
    assert torch.equal(logits(model, batch_of(name)), logits(loaded, batch_of(name)))


@pytest.mark.parametrize("variant", ["random", "task_free"])
def test_variants_that_need_no_data_load_as_well(variant):
    model, loaded = trained("bert", variant=variant), fresh("bert", variant=variant, seed=1)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, batch_of("bert")), logits(loaded, batch_of("bert")))


def test_a_model_that_chose_otherwise_takes_the_choice_of_the_state_dict():
    model, loaded = trained("bert", density=0.02), trained("bert", density=0.4)
    loaded.load_state_dict(model.state_dict())
    assert_same(child_of(model), child_of(loaded))
    assert torch.equal(logits(model, batch_of("bert")), logits(loaded, batch_of("bert")))


def test_what_was_loaded_trains_also_where_layers_have_no_child():
    model, loaded = trained("bert", density=0.01), fresh("bert", density=0.01)
    assert any(not layer.named_deltas("default") for layer in child_tuning_layers(model).values())
    loaded.load_state_dict(model.state_dict())
    before = snapshot(loaded)
    train(loaded.train(), [batch_of("bert")])
    changed = {key for key, value in snapshot(loaded).items() if not torch.equal(value, before[key])}
    assert any(".child_delta." in key for key in changed)
    assert all(".child_delta." in key or ".modules_to_save." in key for key in changed)


def test_a_module_around_the_model_loads_its_state_dict():
    holder, model = torch.nn.Sequential(fresh("bert")), torch.nn.Sequential(trained("bert"))
    holder.load_state_dict(model.state_dict())
    assert torch.equal(logits(model[0], batch_of("bert")), logits(holder[0], batch_of("bert")))


def test_averaged_copies_go_on_in_a_fresh_model():
    averaged = torch.optim.swa_utils.AveragedModel(trained("bert"))
    resumed = torch.optim.swa_utils.AveragedModel(fresh("bert"))
    resumed.load_state_dict(averaged.state_dict())
    assert_same(snapshot(averaged), snapshot(resumed))


def test_a_transformers_model_with_the_adapter_loads_a_whole_state_dict():
    model, loaded = build("bert"), build("bert")
    for each in (model, loaded):
        each.add_adapter(config_for("bert", variant="random", seed=int(each is model)))
    move(model)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, batch_of("bert")), logits(loaded, batch_of("bert")))


def test_a_part_of_a_state_dict_leaves_the_rest_alone():
    model, loaded = trained("bert"), trained("bert")
    part = {key: value for key, value in model.state_dict().items() if ".layer.0." in key and ".child_" in key}
    before = snapshot(loaded)
    loaded.load_state_dict(part, strict=False)
    assert_same(snapshot(loaded), {**before, **part})


def test_loading_sizes_that_fit_keeps_the_parameters():
    model = trained("bert")
    before = [id(parameter) for parameter in model.parameters()]
    model.load_state_dict(trained("bert").state_dict())
    assert [id(parameter) for parameter in model.parameters()] == before


def broken(state, change):
    """A copy of a state dict with one block changed, and the name of the parameter that it belongs to."""
    state = copy.deepcopy(state)
    key = [key for key in state if ".child_index." in key][-1]
    change(state, key)
    name = re.escape(key.replace("base_model.model.", "").replace(".child_index.default", ""))
    return state, name


def without(state, key):
    del state[key]


def flipped(state, key):
    state[key][0] ^= 1


def of_another_tensor(state, key):
    blocks = [other for other in state if ".child_index." in other and state[other].numel() != state[key].numel()]
    state[key] = state[blocks[0]]


@pytest.mark.parametrize("change", [without, flipped, of_another_tensor])
def test_a_state_dict_that_is_damaged_changes_nothing(change):
    loaded = trained("bert", density=0.1)
    state, name = broken(trained("bert").state_dict(), change)
    before = snapshot(loaded)
    with pytest.raises(FormatError, match=f"'{name}'"):
        loaded.load_state_dict(state)
    assert_same(before, snapshot(loaded))


def test_a_state_dict_that_is_damaged_in_one_adapter_changes_no_other():
    def with_two(density):
        model = trained("bert", variant="random", density=density)
        model.add_adapter("second", config_for("bert", variant="random", density=density))
        return model

    state, loaded = with_two(0.1).state_dict(), with_two(0.2)
    flipped(state, next(key for key in state if ".child_index.second." in key))
    before = snapshot(loaded)
    with pytest.raises(FormatError):
        loaded.load_state_dict(state)
    assert_same(before, snapshot(loaded))


GOLDEN = Path(__file__).parents[1] / "golden" / "models"


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_adapters_that_earlier_versions_saved_load_as_ever(name):
    """Saved by earlier code, most of it before the package had folders; read here by the page on the format alone."""
    tensors = load_file(GOLDEN / name / "adapter_model.safetensors")
    expected = build("bert")
    weights = expected.state_dict()
    for key, value in tensors.items():
        plain = key.removeprefix("base_model.model.")
        if ".child_" not in key:
            weights[plain].copy_(value)
    for key, (indices, values) in read_independently(GOLDEN / name / "adapter_model.safetensors").items():
        weights[key].view(-1)[torch.tensor(indices)] += torch.tensor(values)
    model = PeftModel.from_pretrained(build("bert"), GOLDEN / name, is_trainable=True)
    assert torch.equal(logits(model, batch_of("bert")), logits(expected, batch_of("bert")))
    masks = {key for key in tensors if ".child_mask." in key}
    assert bool(masks) == (name in ("masked", "task_free"))
    assert masks <= {key.replace(".default", "") for key in model.state_dict()}
