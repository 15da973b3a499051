"""Base models that accelerate has offloaded: they work where their weights are there when needed, or are refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

from peft_child import select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move, train
from ..problems import batch_of, build


REFUSED = r"is offloaded \(on the meta device\). Child-Tuning supports that for the weights of linear layers alone"
LINEAR = {"target_modules": ["q_proj", "down_proj"]}


def offload(model, place, folder):
    if place == "cpu":
        return cpu_offload(model)
    disk_offload(model, folder / "offloaded")
    return model


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("variant", ["task_driven", "random", "task_free"])
def test_linear_layers_train_as_if_they_were_not_offloaded(tmp_path, place, variant, granularity):
    batches = [batch_of("llama", seed) for seed in range(3)]
    found = []
    for base in (build("llama"), offload(build("llama"), place, tmp_path)):
        model = get_peft_model(base, config_for("llama", variant=variant, **LINEAR))
        if variant == "task_driven":
            select_child_network(model, batches, progress_bar=False)
        train(model, batches)
        found.append(model)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "child_" not in name)
    assert_same(child_of(found[0]), child_of(found[1]))
    for first, second in zip(*(list(child_tuning_layers(model).values()) for model in found), strict=True):
        for name, delta in first.named_deltas("default").items():
            torch.testing.assert_close(second.named_deltas("default")[name], delta, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(found[1], batches[0]), logits(found[0], batches[0]), rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batches[0]), logits(model, batches[0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is offloaded: load the base model without offloading to merge"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # torch's, which PEFT lets through
def test_an_adapter_is_loaded_onto_an_offloaded_base(tmp_path, granularity):
    model = get_peft_model(build("llama"), config_for("llama", variant="random", **LINEAR))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(offload(build("llama"), "disk", tmp_path), tmp_path / "adapter")
    expected = logits(model, batch_of("llama"))
    torch.testing.assert_close(logits(loaded, batch_of("llama")), expected, rtol=0, atol=1e-5)


WORK = {
    "evaluating": lambda model: logits(model, batch_of("llama")),
    "training": lambda model: model.train()(**batch_of("llama")).loss.backward(),
    "merging": lambda model: model.merge_adapter(),
    "merging and unloading": lambda model: model.merge_and_unload(),
    "choosing": lambda model: select_child_network(model, [batch_of("llama")], progress_bar=False),
}


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("work", WORK)
def test_other_weights_that_are_offloaded_are_refused(work, place, tmp_path):
    base = offload(build("llama"), place, tmp_path)
    changes = {"variant": "task_driven"} if work == "choosing" else {"variant": "random", "init_weights": False}
    model = get_peft_model(base, config_for("llama", target_modules=["embed_tokens"], **changes))
    with pytest.raises(RuntimeError, match=REFUSED):
        WORK[work](model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_saving_an_offloaded_adapter_is_refused(place, tmp_path):
    model = chosen_model("llama")
    model = offload(model, place, tmp_path)
    with pytest.raises(RuntimeError, match=r"child network of 'model.layers.0.self_attn.\w_proj.weight' " + REFUSED):
        model.save_pretrained(tmp_path / "adapter")


def test_a_dispatched_base_is_offloaded_around_the_layers_and_works(tmp_path):
    model = chosen_model("llama")
    move(model)
    expected = logits(model, batch_of("llama"))
    model.save_pretrained(tmp_path / "adapter")
    places = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    device_map = {**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"}
    options = {"main_device": "cpu", "offload_dir": tmp_path / "offloaded", "force_hooks": True}
    base = dispatch_model(build("llama"), device_map, **options)
    assert any(parameter.is_meta for parameter in base.parameters())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch_of("llama")), expected)
