"""ChildTuningCallback in transformers.Trainer."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_child import ChildTuningCallback, estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, move, snapshot
from ..problems import batch_of, build
from ..ranks import on_two_ranks
from .test_trainer import Rows


pytestmark = pytest.mark.slow


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "logging_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
    )


def trainer_for(model, folder, *callbacks, **changes):
    rows = Rows("bert")
    return Trainer(model, arguments(folder, **changes), train_dataset=rows, eval_dataset=rows, callbacks=[*callbacks])


class Recorder(TrainerCallback):
    """What a reporter would send."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def unchosen(**changes):
    return get_peft_model(build("bert"), config_for("bert", **changes))


def test_the_trainer_chooses_what_select_child_network_chooses(tmp_path):
    expected, model = chosen_model("bert"), unchosen()
    trainer = trainer_for(model, tmp_path, ChildTuningCallback([batch_of("bert")], progress_bar=False))
    assert_same(child_of(model), child_of(expected))
    assert_same(snapshot(model), snapshot(expected))
    assert model.peft_config["default"].fisher_examples == 4
    trainer.train()
    trainer_for(expected, tmp_path).train()
    assert_same(snapshot(model), snapshot(expected))  # weights, and so losses, order of the data and dropout


def test_scores_and_further_arguments_are_passed_on(tmp_path):
    scores = estimate_fisher(unchosen(), [batch_of("bert", 3)], progress_bar=False)
    chosen = unchosen()
    select_child_network(chosen, scores=scores)
    expected = child_of(chosen)
    save_file(scores, tmp_path / "scores.safetensors")
    for given in (scores, tmp_path / "scores.safetensors"):
        model = unchosen()
        trainer_for(model, tmp_path, ChildTuningCallback(scores=given))
        assert_same(child_of(model), expected)
    calls, model = [], unchosen()

    def forward(model, batch):
        calls.append(batch)
        return model(**batch)

    rows = DataLoader(Rows("bert"), batch_size=4)
    trainer_for(model, tmp_path, ChildTuningCallback(rows, num_examples=3, forward_fn=forward, progress_bar=False))
    assert model.peft_config["default"].fisher_examples == 3
    assert len(calls) == 4  # the first two examples alone and together, and the third


@pytest.mark.parametrize("variant", ["task_driven", "random"])
def test_a_child_network_that_is_there_stays(tmp_path, variant):
    model = chosen_model("bert", variant=variant)
    before = snapshot(model)
    trainer_for(model, tmp_path, ChildTuningCallback([batch_of("bert", 9)], progress_bar=False))
    assert_same(snapshot(model), before)


def test_an_adapter_of_another_name(tmp_path):
    model = get_peft_model(build("bert"), config_for("bert"), adapter_name="mrpc")
    trainer_for(model, tmp_path, ChildTuningCallback([batch_of("bert")], adapter_name="mrpc", progress_bar=False))
    assert_same(child_of(model, "mrpc"), child_of(chosen_model("bert")))
    with pytest.raises(ValueError, match="no Child-Tuning adapter named 'default'"):
        trainer_for(model, tmp_path, ChildTuningCallback([batch_of("bert")], progress_bar=False))


def test_what_cannot_be_chosen_is_said_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="either a dataloader or scores, got both"):
        trainer_for(unchosen(), tmp_path, ChildTuningCallback([batch_of("bert")], scores={}))
    with pytest.raises(ValueError, match="no Child-Tuning adapter"):
        trainer_for(build("bert"), tmp_path, ChildTuningCallback([batch_of("bert")]))


def test_without_data_it_only_logs(tmp_path):
    model = unchosen()
    trainer = trainer_for(model, tmp_path, ChildTuningCallback())
    with pytest.raises(RuntimeError, match="has not been chosen"):
        trainer.train()
    trainer = trainer_for(chosen_model("bert"), tmp_path, ChildTuningCallback())
    trainer.train()
    assert "child/norm" in trainer.state.log_history[0]


def test_resuming_takes_the_child_network_of_the_checkpoint(tmp_path):
    model = unchosen()
    trainer = trainer_for(model, tmp_path, ChildTuningCallback([batch_of("bert")], progress_bar=False))
    trainer.train()
    resumed = unchosen()
    again = trainer_for(resumed, tmp_path / "again", ChildTuningCallback([batch_of("bert", 9)], progress_bar=False))
    assert any(not torch.equal(index, child_of(model)[key]) for key, index in child_of(resumed).items())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(snapshot(resumed), snapshot(model))
    numbers = [
        [{key: value for key, value in entry.items() if key.startswith("child/")} for entry in each.state.log_history]
        for each in (trainer, again)
    ]
    assert numbers[0] == numbers[1]


def test_numbers_are_those_of_the_deltas_and_reach_history_checkpoint_and_reporters(tmp_path):
    recorder, model = Recorder(), unchosen(density=0.1)
    callback = ChildTuningCallback([batch_of("bert")], progress_bar=False)
    trainer = trainer_for(model, tmp_path, callback, recorder, eval_strategy="steps", eval_steps=3, save_steps=6)
    trainer.train()
    deltas = {
        name: delta.values.detach()
        for layer in child_tuning_layers(model).values()
        for name, delta in layer.sparse_deltas("default").items()
    }

    def joined(part):
        return torch.cat([delta for name, delta in deltas.items() if part in name])

    whole = joined("")
    expected = {
        "child/moved": pytest.approx((whole != 0).double().mean().item(), rel=1e-12),
        "child/norm": pytest.approx(whole.double().norm().item(), rel=1e-12),
        "child/norm/layer.0": pytest.approx(joined("layer.0.").double().norm().item(), rel=1e-12),
        "child/norm/layer.1": pytest.approx(joined("layer.1.").double().norm().item(), rel=1e-12),
        "child/norm/other": pytest.approx(joined("pooler").double().norm().item(), rel=1e-12),
    }
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4, 6]
    assert {key: value for key, value in training[-1].items() if key.startswith("child/")} == expected
    assert all(type(value) is float for entry in training for key, value in entry.items() if "child/" in key)
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry for entry in saved if "loss" in entry] == training
    sent = [logs for logs in recorder.logs if "loss" in logs]
    assert [{**logs, "step": entry["step"]} for logs, entry in zip(sent, training, strict=True)] == training
    other = [entry for entry in (*trainer.state.log_history, *recorder.logs) if "loss" not in entry]
    assert len(other) == 6  # evaluations, and the summary of the training
    assert not any(key.startswith("child/") for entry in other for key in entry)


def test_a_reporter_of_the_trainer_is_reached_when_it_is_moved_to_the_end(tmp_path):
    trainer = trainer_for(chosen_model("bert"), tmp_path, Recorder(), ChildTuningCallback())
    trainer.add_callback(trainer.pop_callback(Recorder))
    recorder = trainer.callback_handler.callbacks[-1]
    trainer.train()
    assert "child/moved" in recorder.logs[0]


def test_numbers_of_a_child_network_that_has_not_moved(tmp_path):
    trainer = trainer_for(chosen_model("bert"), tmp_path, ChildTuningCallback(), learning_rate=0.0)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["child/moved"] == first["child/norm"] == 0.0


def numbers_of_both(folder):
    """What is logged of a model before and after it is sharded."""
    model = chosen_model("llama")
    torch.manual_seed(3)
    move(model)
    found = []
    for parts in ((), (*model.base_model.model.model.layers, model)):
        for part in parts:
            fully_shard(part)
        logs, state = {"loss": 1.0}, TrainerState(log_history=[{}])
        ChildTuningCallback().on_log(None, state, None, logs=logs, model=model)
        found.append(logs)
    return found


def test_numbers_of_a_sharded_model_are_those_of_the_whole(tmp_path):
    for whole, sharded in on_two_ranks(numbers_of_both, tmp_path):
        assert whole["child/norm"] > 0
        assert sharded == pytest.approx(whole, rel=1e-12)


class StepsOnCopies(torch.optim.SGD):
    """As engines do that keep master copies: torch calls its hooks, for tensors that nobody knows."""

    def __init__(self, parameters):
        self.originals = list(parameters)
        super().__init__([parameter.detach().clone() for parameter in self.originals], lr=0.1)

    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for copied, original in zip(copies, self.originals, strict=True):
            copied.grad = original.grad
        super().step()
        with torch.no_grad():
            for copied, original in zip(copies, self.originals, strict=True):
                original.copy_(copied)

    def zero_grad(self, set_to_none=True):
        for original in self.originals:
            original.grad = None


@pytest.mark.parametrize("on_copies", [False, True])
def test_steps_are_counted_once_whatever_the_optimizer_steps_on(tmp_path, on_copies):
    seen = []
    for count_steps in (False, True):
        model = unchosen(variant="task_free")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = StepsOnCopies(trainable) if on_copies else torch.optim.SGD(trainable, lr=0.1)
        trainer = Trainer(
            model,
            arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=Rows("bert"),
            callbacks=[ChildTuningCallback(count_steps=count_steps)],
            optimizers=(optimizer, None),
        )
        trainer.train()
        seen.append({step for layer in child_tuning_layers(model).values() for step in layer.counted_steps()})
    assert seen == [{0}, {6}] if on_copies else [{6}, {6}]
