"""TRL's trainers with a Child-Tuning configuration in place of one for LoRA."""

import random

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from peft_child import ChildTuningCallback, ChildTuningConfig, estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, move, snapshot
from ..problems import batch_of, tiny_gpt2, tiny_llama
from ..sft_data import word_tokenizer


# TRL and datasets warn of what the coming versions of transformers and of Python will change.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")

WORDS = [f"w{number}" for number in range(45)]
VARIANTS = ["task_driven", "random", "task_free"]
BASES = {"llama": (tiny_llama, "all-linear"), "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"])}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def base_of(name="llama"):
    torch.manual_seed(0)
    return BASES[name][0]()


def config_of(name="llama", **changes):
    return ChildTuningConfig(**{"target_modules": BASES[name][1], "density": 0.3, "task_type": "CAUSAL_LM", **changes})


def arguments(kind, folder, **changes):
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_length": 16,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
    )


def texts(columns, count=16):
    import datasets

    draw = random.Random(0)
    rows = [{name: " ".join(draw.choices(WORDS, k=draw.randint(3, 6))) for name in columns} for _ in range(count)]
    return datasets.Dataset.from_list(rows)


def sft(folder, tokenizer, model=None, callbacks=None, peft_config=None, **changes):
    model = base_of() if model is None else model
    return trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, folder, **changes),
        train_dataset=texts(["text"]),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def dpo(folder, tokenizer, model=None, peft_config=None, ref_model=None, **changes):
    return trl.DPOTrainer(
        base_of() if model is None else model,
        ref_model=ref_model,
        args=arguments(trl.DPOConfig, folder, **changes),
        train_dataset=texts(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def is_trained(model, adapter_name="default"):
    layers = [layer for layer in child_tuning_layers(model).values() if layer.sizes(adapter_name)]
    return bool(layers) and all(layer.is_trained(adapter_name) for layer in layers)


def base_weights(model):
    return {key: value for key, value in snapshot(model).items() if "child_" not in key}


# Supervised fine-tuning


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BASES)
def test_supervised_fine_tuning(tmp_path, tokenizer, name, variant):
    """With TRL's defaults: bfloat16 autocast and activation checkpointing."""
    trainer = sft(tmp_path, tokenizer, base_of(name), [ChildTuningCallback()], config_of(name, variant=variant))
    assert trainer.args.bf16
    assert trainer.args.activation_checkpointing
    if variant == "task_driven":
        select_child_network(trainer.model, trainer.get_train_dataloader(), progress_bar=False)
    model, before = trainer.model, base_weights(trainer.model)
    child = child_of(model)
    trainer.train()
    assert is_trained(model)
    assert_same(base_weights(model), before)
    assert_same(child_of(model), child)
    assert {value.dtype for key, value in model.named_parameters() if "child_delta" in key} == {torch.float32}
    assert [entry["child/norm"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True] * 4
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path / "checkpoint-4")
    assert_same(snapshot(loaded), snapshot(model))


@pytest.mark.parametrize("packing", [False, True])
def test_the_choice_on_what_the_trainer_feeds_is_that_of_the_plain_model(tmp_path, tokenizer, packing):
    options = {"packing": True, "per_device_train_batch_size": 1} if packing else {}
    trainer = sft(tmp_path, tokenizer, peft_config=config_of(), **options)
    batches = list(trainer.get_train_dataloader())
    select_child_network(trainer.model, batches, progress_bar=False)
    plain = get_peft_model(base_of(), config_of())
    plain.config.use_cache = False  # as TRL sets it; with a cache, transformers lets packed sequences see each other
    select_child_network(plain, batches, progress_bar=False)
    assert_same(child_of(trainer.model), child_of(plain))


def test_the_callback_chooses_from_data_or_scores(tmp_path, tokenizer):
    """A callback has to be given data, since the Trainer's own is not ready when it is made."""
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts(["text"])["text"]]
    batches = [{"input_ids": ids, "labels": ids} for ids in rows]
    plain = get_peft_model(base_of(), config_of())
    scores = estimate_fisher(plain, batches, progress_bar=False)
    select_child_network(plain, scores=scores)
    for callback in (ChildTuningCallback(batches, progress_bar=False), ChildTuningCallback(scores=scores)):
        trainer = sft(tmp_path, tokenizer, callbacks=[callback], peft_config=config_of())
        assert_same(child_of(trainer.model), child_of(plain))
        trainer.train()
        assert is_trained(trainer.model)


def test_a_chosen_model_resumes_bit_for_bit(tmp_path, tokenizer):
    def chosen():
        model = get_peft_model(base_of(), config_of())
        select_child_network(model, [batch_of("llama")], progress_bar=False)
        return model

    whole = sft(tmp_path / "whole", tokenizer, chosen())
    whole.train()
    resumed = sft(tmp_path / "resumed", tokenizer, get_peft_model(base_of(), config_of()))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(snapshot(resumed.model), snapshot(whole.model))


def test_an_unchosen_network_is_refused(tmp_path, tokenizer):
    with pytest.raises(RuntimeError, match="has not been chosen: call select_child_network"):
        sft(tmp_path, tokenizer, peft_config=config_of()).train()


def test_a_targeted_head_is_refused_by_trl(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(tmp_path, tokenizer, peft_config=config_of(target_modules=["lm_head"]))


# Preferences


def completions(model, batch):
    """The log-likelihood of the completions, chosen and rejected alike; the batches of DPO have no labels."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)


def log_likelihoods(model, batch):
    """Sums over the tokens of each completion, by definition."""
    with torch.no_grad():
        scores = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (scores.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * mask).sum(1).chunk(2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BASES)
def test_the_reference_of_dpo_is_the_base_model(tmp_path, tokenizer, name, variant):
    trainer = dpo(tmp_path, tokenizer, base_of(name), config_of(name, variant=variant), bf16=False)
    if variant == "task_driven":
        data = trainer.get_train_dataloader()
        chosen = select_child_network(trainer.model, data, forward_fn=completions, progress_bar=False)
        assert trainer.model.peft_config["default"].fisher_examples == 2 * 16
        assert chosen.chosen == sum(map(len, child_of(trainer.model).values()))
    batch = next(iter(trainer.get_train_dataloader()))
    model, before = trainer.model, base_weights(trainer.model)
    expected = trainer.compute_ref_log_probs(model, batch)
    for ours, plain in zip(expected, log_likelihoods(base_of(name), batch), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert is_trained(model)
    assert_same(base_weights(model), before)
    assert all(map(torch.equal, trainer.compute_ref_log_probs(model, batch), expected))
    policy = log_likelihoods(model, batch)
    assert not any(torch.allclose(ours, plain) for ours, plain in zip(policy, expected, strict=True))
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0  # the policy starts at its reference


def test_reference_log_probabilities_computed_before(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tokenizer, peft_config=config_of(variant="random"), precompute_ref_log_probs=True)
    trainer.train()
    assert is_trained(trainer.model)
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


def test_the_loss_of_dpo_itself_can_score(tmp_path, tokenizer):
    """It runs the reference model inside the pass; pairs cannot be taken apart, so every batch is one pair."""
    trainer = dpo(tmp_path, tokenizer, peft_config=config_of())
    before = snapshot(trainer.model)
    pairs = DataLoader(trainer.train_dataset, batch_size=1, collate_fn=trainer.data_collator)
    scores = estimate_fisher(
        trainer.model, pairs, forward_fn=trainer.compute_loss, split_batches=False, progress_bar=False
    )
    assert_same(snapshot(trainer.model), before)
    plain = base_of().eval().requires_grad_(True)
    squares = {name: torch.zeros_like(score) for name, score in scores.items()}
    for batch in pairs:
        sums = [completions_sum(plain, batch, row) for row in range(2)]
        gap = torch.autograd.grad(sums[0] - sums[1], [plain.get_parameter(name) for name in scores])
        for name, gradient in zip(scores, gap, strict=True):
            squares[name] += (0.5 * trainer.beta * gradient) ** 2  # the slope of -log sigmoid(beta x) at 0
    for name, score in scores.items():
        torch.testing.assert_close(score, squares[name] / len(pairs), rtol=1e-3, atol=1e-12)


def completions_sum(model, batch, row):
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[row, :-1]
    ids, mask = batch["input_ids"][row, 1:], batch["completion_mask"][row, 1:]
    return (scores.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1) * mask).sum()


def test_preferences_after_supervised_fine_tuning(tmp_path, tokenizer):
    """The adapter goes on; its reference is a merged copy of what it was."""

    def tuned(**options):
        return PeftModel.from_pretrained(base_of(), tmp_path / "sft" / "checkpoint-4", **options)

    sft(tmp_path / "sft", tokenizer, peft_config=config_of(variant="random")).train()
    reference = tuned().merge_and_unload()
    trainer = dpo(tmp_path / "dpo", tokenizer, tuned(is_trainable=True), ref_model=reference, bf16=False)
    before = snapshot(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = log_likelihoods(reference, batch)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    moved = {key for key, value in snapshot(trainer.model).items() if not torch.equal(value, before[key])}
    assert moved
    assert all("child_delta.default" in key for key in moved)
    for ours, plain in zip(log_likelihoods(reference, batch), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_of_a_trained_adapter_is_a_frozen_copy(tmp_path, tokenizer, variant, loaded):
    model = get_peft_model(base_of(), config_of(variant=variant))
    if variant == "task_driven":
        select_child_network(model, [batch_of("llama")], progress_bar=False)
    move(model)
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(base_of(), tmp_path / "adapter", is_trainable=True)
    trainer = dpo(tmp_path, tokenizer, model, bf16=False)
    assert_same(child_of(model, "ref"), child_of(model))
    batch = next(iter(trainer.get_train_dataloader()))
    before = snapshot(model)
    expected = log_likelihoods(model, batch)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    moved = {key for key, value in snapshot(trainer.model).items() if not torch.equal(value, before[key])}
    assert any("child_delta.default" in key for key in moved)
    assert not any(".ref." in key or "base_layer" in key for key in moved)
    for found, wanted in zip(trainer.compute_ref_log_probs(model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted)
