"""transformers.Trainer with nothing but a chosen child network."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_child import select_child_network

from .helpers import assert_same, child_of, chosen_model, config_for, logits, snapshot
from .problems import batch_of, build


class Rows(Dataset):
    def __init__(self, name, count=24):
        torch.manual_seed(5)
        batch = [batch_of(name, seed) for seed in range(count // 4)]
        self.columns = {key: torch.cat([each[key] for each in batch]) for key in batch[0]}
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {key: column[index] for key, column in self.columns.items()}


def trainer_for(model, folder, **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return Trainer(model, TrainingArguments(**options), train_dataset=Rows("bert"), eval_dataset=Rows("bert", 8))


@pytest.mark.parametrize("selected_before", [True, False])
def test_resuming_equals_the_uninterrupted_run(tmp_path, selected_before):
    model = chosen_model("bert")
    child = child_of(model)
    trainer_for(model, tmp_path).train()

    # Another child network, or none at all: the one in the checkpoint counts.
    resumed = get_peft_model(build("bert"), config_for("bert"))
    if selected_before:
        select_child_network(resumed, [batch_of("bert", 9)], progress_bar=False)
        assert any(not torch.equal(indices, child[key]) for key, indices in child_of(resumed).items())
    trainer_for(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(snapshot(resumed), snapshot(model))
    assert_same(child_of(resumed), child)
    assert resumed.peft_config["default"].child_sizes == model.peft_config["default"].child_sizes


def test_the_best_model_comes_back_and_the_base_has_not_moved(tmp_path):
    base = build("bert")
    weights = {key: (value, value.detach().clone()) for key, value in base.bert.named_parameters()}
    model = chosen_model("bert", base)
    trainer = trainer_for(
        model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, logging_steps=3
    )
    trainer.train()
    best = PeftModel.from_pretrained(build("bert"), trainer.state.best_model_checkpoint)
    assert torch.equal(logits(best, batch_of("bert")), logits(model, batch_of("bert")))
    assert all(torch.equal(value, copied) for value, copied in weights.values())


def test_training_an_unchosen_network_is_refused(tmp_path):
    model = get_peft_model(build("bert"), config_for("bert"))
    with pytest.raises(RuntimeError, match="has not been chosen: call select_child_network"):
        trainer_for(model, tmp_path).train()


def test_gradient_checkpointing_and_bf16(tmp_path):
    model = chosen_model("bert")
    before = snapshot(model)
    trainer_for(model, tmp_path, activation_checkpointing=True, bf16=True).train()
    moved = {key for key, value in snapshot(model).items() if not torch.equal(value, before[key])}
    assert moved
    assert all("child_delta" in key or "modules_to_save" in key for key in moved)
