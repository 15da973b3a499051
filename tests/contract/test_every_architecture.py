"""Every architecture of transformers that can be built tiny, beside PEFT's LoRA, which sets what has to work."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as WITH_DEFAULTS
from peft.utils.other import AuxiliaryTrainingWrapper

from peft_child import ChildTuningConfig
from peft_child.layers.layer import child_tuning_layers

from ..architectures import TASKS, architectures, run, runnable
from ..helpers import assert_same, move, snapshot


pytestmark = [pytest.mark.by_hand, pytest.mark.filterwarnings("ignore")]

CASES = [(task, name) for task in TASKS for name in architectures(task)]
TARGETED = [(*case, "all-linear") for case in CASES] + [(*case, None) for case in CASES if case[1] in WITH_DEFAULTS]
AT_LEAST = {
    "sequence_classification": 120,
    "token_classification": 95,
    "question_answering": 75,
    "multiple_choice": 33,
}
METHODS = {"lora": (LoraConfig, {"r": 4}), "ours": (ChildTuningConfig, {"variant": "random", "density": 0.3})}


def failures(method, task, model_type, target_modules, folder):
    """The steps in the life of an adapter that fail, with the errors. What is ours must be exact as well."""
    original, batch = runnable(task, model_type)
    config_class, settings = METHODS[method]
    failed, ours = {}, method == "ours"

    @contextmanager
    def step(name):
        try:
            yield
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"

    def adapted():
        config = config_class(task_type=TASKS[task], target_modules=target_modules, **settings)
        return get_peft_model(copy.deepcopy(original), config)

    model = None
    with step("adapt"):
        model = adapted()
    if model is None:
        return failed
    with step("backward"):
        run(model.train(), batch).sum().backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
        if ours:
            check_gradients(model, copy.deepcopy(original).train(), batch)
    if ours:
        check_places(model)
        move(model)
        move_saved_whole(model)
    with torch.no_grad():
        with step("forward"):
            expected = run(model.eval(), batch)
            assert not ours or not torch.equal(expected, run(original, batch)), "the adapter changes nothing"
        with step("save and load"):
            model.save_pretrained(folder)
            found = run(PeftModel.from_pretrained(copy.deepcopy(original), folder).eval(), batch)
            assert not ours or torch.equal(found, expected), "the loaded adapter computes something else"
        with step("merge"):
            found = run(model.merge_and_unload(), batch)
            assert not ours or torch.equal(found, expected), "the merged adapter computes something else"
        with step("unload"):
            unloaded = adapted().unload()
            run(unloaded, batch)
            if ours:
                assert_same(snapshot(unloaded), snapshot(original))
    return failed


def check_gradients(model, plain, batch):
    """Deltas take the gradients that the base weights would take in these entries, with all else frozen."""
    layers = child_tuning_layers(model).values()
    targets = {target for layer in layers for target in layer.child_targets["default"].values()}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in targets or name.startswith(saved_whole(model)))
    run(plain, batch).sum().backward()
    weights = dict(plain.named_parameters(remove_duplicate=False))
    for layer in layers:
        for name, target in layer.child_targets["default"].items():
            delta, full = layer._deltas("default").get(name), weights[target].grad
            if delta is None or full is None or delta.grad is None:  # not run, or only by one of the two for nothing
                assert delta is None or not any(g.any() for g in (full, delta.grad) if g is not None), target
            else:
                chosen = full.reshape(-1)[layer.indices("default", name).long()]
                torch.testing.assert_close(delta.grad, chosen, rtol=1e-3, atol=1e-5 * full.abs().max().item())


def saved_whole(model):
    """Beginnings of the names that the parameters of modules saved whole have in the base model."""
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()]
    return tuple(name.split("modules_to_save.")[0] for name in names if ".modules_to_save." in name)


@torch.no_grad()
def move_saved_whole(model):
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def check_places(model):
    assert child_tuning_layers(model)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert not child_tuning_layers(module)


@pytest.mark.parametrize(("task", "model_type", "target_modules"), TARGETED)
def test_nothing_fails_that_works_with_lora(task, model_type, target_modules, tmp_path, record_property):
    if isinstance(runnable(task, model_type), str):
        pytest.skip(runnable(task, model_type))
    lora = failures("lora", task, model_type, target_modules, tmp_path / "lora")
    ours = failures("ours", task, model_type, target_modules, tmp_path / "ours")
    record_property("lora", str(lora))
    record_property("ours", str(ours))
    assert not {name: error for name, error in ours.items() if name not in lora}


@pytest.mark.parametrize("task", TASKS)
def test_most_architectures_are_run(task):
    reasons = {name: runnable(task, name) for name in architectures(task)}
    left_out = {name: reason for name, reason in reasons.items() if isinstance(reason, str)}
    assert len(reasons) - len(left_out) >= AT_LEAST[task], left_out
