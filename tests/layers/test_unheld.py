"""Optimizers that were made before the child network was chosen."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_child import keep_largest, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, move, snapshot, train
from ..problems import batch_of, build


def made_early(name, holds):
    """A model and an optimizer that was made before its child network was chosen."""
    model = get_peft_model(build(name), config_for(name, modules_to_save=None if holds == "all" else ["classifier"]))
    held = model.parameters() if holds == "all" else [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(list(held), lr=0.1)


@pytest.mark.parametrize("holds", ["all", "trainable"])
def test_an_optimizer_made_before_the_choice_raises_at_its_first_step(holds):
    model, optimizer = made_early("bert", holds)
    select_child_network(model, [batch_of("bert")], progress_bar=False)
    model(**batch_of("bert")).loss.backward()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"deltas of a child network are in no optimizer.*Make the optimizer after"):
        optimizer.step()
    assert_same(before, snapshot(model))


def test_an_optimizer_made_before_thinning_raises():
    model = chosen_model("bert", variant="task_free")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch_of("bert")).loss.backward()
    optimizer.step()
    keep_largest(model, 0.1)
    model(**batch_of("bert")).loss.backward()
    with pytest.raises(RuntimeError, match="in no optimizer"):
        optimizer.step()


def chosen_again(model):
    model.peft_config["default"].density = 0.02
    select_child_network(model, [batch_of("llama")], progress_bar=False)
    return model


def thinned(model):
    move(model)
    keep_largest(model, 0.02)
    return model


def deleted(model):
    model.delete_adapter("default")
    model.add_adapter("default", config_for("llama"))
    model.set_adapter("default")
    return chosen_again(model)


def unloaded(model):
    return chosen_model("llama", model.unload())


@pytest.mark.parametrize("again", [chosen_again, thinned, deleted, unloaded])
def test_an_optimizer_that_holds_only_the_deltas_of_before_raises(again):
    model = chosen_model("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model = again(model)
    model(**batch_of("llama")).loss.backward()
    count = sum(".child_delta." in name for name, _ in model.named_parameters())
    with pytest.raises(RuntimeError, match=rf"^{count} deltas.* such as '(base_model\.)?model\."):
        optimizer.step()


def test_choosing_the_same_sizes_again_keeps_the_parameters_that_an_optimizer_holds():
    model = chosen_model("bert")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    select_child_network(model, [batch_of("bert")], progress_bar=False)
    model(**batch_of("bert")).loss.backward()
    optimizer.step()
    assert all(layer.is_trained("default") for layer in child_tuning_layers(model).values() if child_of(layer))


def test_a_trainer_with_an_optimizer_that_was_made_before_the_choice_raises(tmp_path):
    model, optimizer = made_early("bert", "all")
    select_child_network(model, [batch_of("bert")], progress_bar=False)
    arguments = TrainingArguments(tmp_path, report_to=[], max_steps=2, use_cpu=True, disable_tqdm=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    rows = [{key: value[index] for key, value in batch_of("bert").items()} for index in range(4)]
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    with pytest.raises(RuntimeError, match="in no optimizer"):
        trainer.train()


def test_two_optimizers_may_share_a_model():
    model = chosen_model("bert", modules_to_save=["classifier"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".child_delta." not in n]
    deltas = [p for n, p in model.named_parameters() if ".child_delta." in n]
    optimizers = [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(deltas, lr=0.1)]
    for _ in range(2):
        model(**batch_of("bert")).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_gradients_of_a_model_that_is_not_trained_do_not_disturb_another():
    looked_at, trained = chosen_model("bert"), chosen_model("bert")
    looked_at(**batch_of("bert")).loss.backward()
    train(trained, [batch_of("bert")])


def test_deltas_that_are_frozen_need_no_optimizer():
    model = chosen_model("bert", modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".child_delta." not in name)
    train(model, [batch_of("bert")])
