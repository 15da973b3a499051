"""transformers.Trainer with nothing but a chosen child network."""

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_child import select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, snapshot
from ..problems import batch_of, build, tiny_bert


pytestmark = pytest.mark.slow


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


VARIANTS = ["task_driven", "random", "task_free"]


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
    assert resumed.peft_config["default"].present_sizes == model.peft_config["default"].present_sizes


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ({}, {"density": 0.2}, r"must have the density of the configuration, 0\.2"),
        ({"variant": "random"}, {"variant": "random", "density": 0.2}, "random child network of .* another seed"),
        ({"variant": "random"}, {"variant": "random", "seed": 1}, "random child network of .* another seed"),
        (
            {"variant": "task_free"},
            {"variant": "task_free", "seed": 1},
            r"gradient mask of .* says density 0\.3, seed 1",
        ),
        ({"variant": "task_free"}, {"variant": "task_free", "density": 0.2}, "gradient mask of "),
        ({"variant": "task_free"}, {}, "this configuration says none"),
        ({}, {"target_modules": ["query"]}, "is no parameter that this adapter targets"),
    ],
)
def test_resuming_with_another_child_network_is_refused(tmp_path, saved, resumed, message):
    trainer_for(chosen_model("bert", **saved), tmp_path, max_steps=3).train()
    model = chosen_model("bert", **resumed)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        trainer_for(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(snapshot(model), before)


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [1, 4, 5])
def test_resuming_at_any_step_with_accumulation_dropout_and_evaluation(tmp_path, step, variant):
    options = {
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "warmup_steps": 2,
        "logging_steps": 1,
    }
    model = chosen_model("bert", variant=variant)
    whole = trainer_for(model, tmp_path, **options)
    whole.train()
    resumed = get_peft_model(build("bert"), config_for("bert", variant=variant))
    again = trainer_for(resumed, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same(snapshot(resumed), snapshot(model))
    assert_same(child_of(resumed), child_of(model))
    assert losses_of(again) == losses_of(whole)
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(folder / "checkpoint-6" / name) for folder in (tmp_path, tmp_path / "again")]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def losses_of(trainer):
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_in_between_changes_no_bit(tmp_path, variant):
    """Without dropout, since every new dataloader draws a random number."""
    models = [chosen_model("bert", tiny_bert_without_dropout(), variant=variant) for _ in range(2)]
    trainer_for(models[0], tmp_path / "plain").train()
    trainer = trainer_for(models[1], tmp_path / "evaluated", eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert_same(snapshot(models[1]), snapshot(models[0]))
    assert trainer.evaluate()["eval_loss"] == losses_of(trainer)[-2]


@pytest.mark.smoke
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_an_adapter(tmp_path, variant):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = chosen_model(
        "bert", AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), variant=variant
    )
    trainer_for(model, tmp_path).train()
    expected = logits(model, batch_of("bert"))
    folder = tmp_path / "checkpoint-6"
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder), batch_of("bert")), expected)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded, batch_of("bert")), expected)
    assert_same(child_of(loaded), child_of(model))


class SmallMemory:
    """A forward hook that fails, as a device without memory does, with batches of more than `rows`."""

    def __init__(self, rows):
        self.rows, self.seen = rows, []

    def __call__(self, module, args, kwargs):
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1] > self.rows:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_size_that_is_found(tmp_path):
    model = chosen_model("bert")
    before = snapshot(model)
    memory = SmallMemory(rows=2)
    model.base_model.model.register_forward_pre_hook(memory, with_kwargs=True)
    trainer = trainer_for(model, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer.train()
    assert memory.seen == [4, 3, *[2] * 6]
    assert trainer.state.global_step == 6
    moved = {key for key, value in snapshot(model).items() if not torch.equal(value, before[key])}
    assert any("child_delta" in key for key in moved)
    assert all("child_delta" in key or "modules_to_save" in key for key in moved)


def test_label_smoothing(tmp_path):
    models = [chosen_model("bert").eval() for _ in range(2)]
    trainer = trainer_for(models[0], tmp_path, label_smoothing_factor=0.2)
    batch = batch_of("bert")
    loss = trainer.compute_loss(models[0], dict(batch))
    expected = F.cross_entropy(models[1](input_ids=batch["input_ids"]).logits, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    twins = dict(models[1].named_parameters())
    for key, value in models[0].named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, twins[key].grad, rtol=1e-5, atol=1e-7)
    trainer.train()
    assert any(layer.is_trained("default") for layer in child_tuning_layers(models[0]).values())


def test_torch_compile(tmp_path):
    """Without dropout, so that the same numbers are drawn."""
    models = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        model = chosen_model("bert", tiny_bert_without_dropout())
        trainer = trainer_for(model, tmp_path / str(len(models)), logging_steps=1, **options)
        trainer.train()
        models.append((model, losses_of(trainer)))
    (model, losses), (compiled, compiled_losses) = models
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    saved = PeftModel.from_pretrained(tiny_bert_without_dropout(), tmp_path / "1" / "checkpoint-6")
    assert torch.equal(logits(saved, batch_of("bert")), logits(compiled, batch_of("bert")))
    torch.testing.assert_close(logits(compiled, batch_of("bert")), logits(model, batch_of("bert")))


def tiny_bert_without_dropout():
    torch.manual_seed(0)
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_gradient_checkpointing_and_bf16(tmp_path):
    model = chosen_model("bert")
    before = snapshot(model)
    new, old = "activation_checkpointing", "gradient_checkpointing"  # in transformers 5.13 the old name alone
    name = new if hasattr(TrainingArguments, new) else old
    trainer_for(model, tmp_path, **{name: True}, bf16=True).train()
    moved = {key for key, value in snapshot(model).items() if not torch.equal(value, before[key])}
    assert moved
    assert all("child_delta" in key or "modules_to_save" in key for key in moved)
