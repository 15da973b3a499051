"""Base models that accelerate has offloaded: they work where their weights are there when needed, or are refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

from peft_child import select_child_network

from ..helpers import chosen_model, config_for, logits, move
from ..problems import batch_of, build


REFUSED = r"is offloaded \(on the meta device\), which Child-Tuning does not support: load the base model without"


def offload(model, place, folder):
    if place == "cpu":
        return cpu_offload(model)
    disk_offload(model, folder / "offloaded")
    return model


WORK = {
    "evaluating": lambda model: logits(model, batch_of("llama")),
    "training": lambda model: model.train()(**batch_of("llama")).loss.backward(),
    "merging": lambda model: model.merge_adapter(),
    "merging and unloading": lambda model: model.merge_and_unload(),
    "combining": lambda model: model.base_model.add_weighted_adapter(["default"], [0.5], "half"),
    "reading": lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.weight.sum(),
}


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("work", WORK)
def test_work_with_an_offloaded_base_is_refused(work, place, tmp_path):
    base = offload(build("llama"), place, tmp_path)
    model = get_peft_model(base, config_for("llama", variant="random", init_weights=False))
    with pytest.raises(RuntimeError, match=REFUSED):
        WORK[work](model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_saving_an_offloaded_adapter_is_refused(place, tmp_path):
    model = chosen_model("llama")
    model = offload(model, place, tmp_path)
    with pytest.raises(RuntimeError, match=r"child network of 'model.layers.0.self_attn.\w_proj.weight' " + REFUSED):
        model.save_pretrained(tmp_path / "adapter")


def test_choosing_in_an_offloaded_base_is_refused():
    model = get_peft_model(cpu_offload(build("llama")), config_for("llama"))
    with pytest.raises(RuntimeError, match=REFUSED):
        select_child_network(model, [batch_of("llama")], progress_bar=False)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # torch's, which PEFT lets through
def test_loading_an_adapter_and_running_it_on_an_offloaded_base_is_refused(tmp_path):
    chosen_model("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(cpu_offload(build("llama")), tmp_path)
    with pytest.raises(RuntimeError, match=REFUSED):
        logits(model, batch_of("llama"))


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
