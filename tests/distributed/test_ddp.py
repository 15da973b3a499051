"""Training in two processes with DistributedDataParallel."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from peft_child import ChildTuningCallback, ChildTuningConfig, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, config_for, settings_of, snapshot, train
from ..integrations.test_trainer import Rows, trainer_for
from ..problems import build, tiny_bert
from ..ranks import on_two_ranks, train_with


pytestmark = pytest.mark.slow  # two processes each

VARIANTS = ("task_driven", "random", "task_free", "channels")
TOLD_TO_DDP = "_ddp_params_and_buffers_to_ignore"


def batches(rank=None):
    """Five global batches of eight examples, or the half of each that belongs to a rank."""
    torch.manual_seed(11)
    found = [{"input_ids": torch.randint(2, 50, (8, 6)), "labels": torch.randint(0, 2, (8,))} for _ in range(5)]
    if rank is None:
        return found
    return [{key: value[4 * rank : 4 * rank + 4] for key, value in batch.items()} for batch in found]


def model_for(variant, rank=None):
    torch.manual_seed(0)
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    changes = settings_of(variant)
    model = get_peft_model(base, config_for("bert", **changes)).train()
    if changes["variant"] == "task_driven":
        select_child_network(model, batches(rank)[:2], progress_bar=False)
    return model


def train_both(folder):
    rank = distributed.get_rank()
    found = {}
    for variant in VARIANTS:
        model = model_for(variant, rank).double()
        wrapped = DistributedDataParallel(model)
        reduced = []

        def count(state, bucket, reduced=reduced):
            reduced.append(bucket.buffer().numel())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, count)
        train(wrapped, batches(rank))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found[variant] = snapshot(model), child_of(model), sum(reduced), trained, list(wrapped.named_module_buffers)
    return found


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    first, second = on_two_ranks(train_both, tmp_path)
    for variant in VARIANTS:
        alone = model_for(variant).double()
        before = snapshot(alone)
        train(alone, batches())
        after, child, reduced, trained, buffers = first[variant]
        assert_same(after, second[variant][0])
        assert_same(child, second[variant][1])
        assert_same(child, child_of(alone))
        expected = snapshot(alone)
        assert after.keys() == expected.keys()
        moved = [name for name in before if not torch.equal(before[name], expected[name])]
        assert any("child_delta" in name for name in moved)
        for name, value in after.items():
            if name in moved:
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)  # halved sums are rounded
            else:
                assert torch.equal(value, before[name])
        # Five steps, each of them reducing what is trained and nothing else; and no index is broadcast.
        assert reduced == 5 * trained
        assert trained == sum(len(indices) for indices in child.values()) + 2 * 16 + 2
        assert not [name for name in buffers if "child" in name]


def resume(folder):
    """Through the Trainer, with dropout, and stopped in the middle of an epoch."""
    rank = distributed.get_rank()

    def model_of(batches):
        torch.manual_seed(0)
        model = get_peft_model(build("bert"), config_for("bert", gradient_density=0.5))
        select_child_network(model, batches, progress_bar=False)
        return model

    model = model_of(batches(rank)[:2])
    trainer_for(model, folder / "whole", save_steps=2).train()
    resumed = model_of(batches(rank)[2:])  # another child network; that of the checkpoint counts
    assert any(not torch.equal(indices, child_of(model)[name]) for name, indices in child_of(resumed).items())
    trainer = trainer_for(resumed, folder / "again", save_steps=2)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return snapshot(model), snapshot(resumed)


def test_resuming_the_trainer_equals_the_uninterrupted_run(tmp_path):
    (first, first_resumed), (second, second_resumed) = on_two_ranks(resume, tmp_path)
    assert_same(first, first_resumed)
    assert_same(second, second_resumed)
    assert_same(first, second)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "again" / "checkpoint-6")
    deltas = {name: value for name, value in snapshot(loaded).items() if "child_delta" in name}
    assert deltas
    assert_same(deltas, {name: first[name] for name in deltas})


def disagreeing(folder):
    """Every rank with another seed, which DDP alone would not notice: the sizes are the same."""
    found = []
    for variant in ("random", "task_free"):
        torch.manual_seed(0)
        model = get_peft_model(build("bert"), config_for("bert", variant=variant, seed=distributed.get_rank()))
        trainer = trainer_for(model, folder)
        trainer.add_callback(ChildTuningCallback())
        with pytest.raises(ValueError, match="Every process must have the same") as caught:
            trainer.train()
        found.append(str(caught.value))
    return found


def test_the_callback_notices_ranks_that_train_different_child_networks(tmp_path):
    first, second = on_two_ranks(disagreeing, tmp_path)
    assert first == second
    assert "child network of adapter 'default'" in first[0]
    assert "gradient masks of adapter 'default'" in first[1]


def accelerated(folder):
    """A loop of one's own through accelerate; its sampler gives every rank each other batch."""
    accelerator = Accelerator(cpu=True)
    model = model_for("task_free").double()
    return snapshot(train_with(accelerator, model, DataLoader(Rows("bert"), batch_size=4)))


def test_accelerate_trains_as_one_process_with_the_whole_batch(tmp_path):
    first, second = on_two_ranks(accelerated, tmp_path)
    assert_same(first, second)
    alone = model_for("task_free").double()
    train(alone, DataLoader(Rows("bert"), batch_size=8))
    for name, value in snapshot(alone).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)  # as above


def buffers_in(model):
    return {name for name, _ in model.named_buffers() if ".child_index." in name or ".child_mask." in name}


@pytest.mark.parametrize("inner", ["PeftModel", "tuner", "base"])
def test_ddp_is_told_of_our_buffers_whatever_it_wraps(inner):
    peft_model = get_peft_model(build("bert"), config_for("bert", variant="random", gradient_density=0.5))
    model = {"PeftModel": peft_model, "tuner": peft_model.base_model, "base": peft_model.get_base_model()}[inner]
    assert buffers_in(model)
    assert buffers_in(model) <= set(getattr(model, TOLD_TO_DDP))
    peft_model.add_adapter("second", config_for("bert", variant="random", target_modules=["query"]))
    assert any(".second." in name for name in buffers_in(model))
    assert buffers_in(model) <= set(getattr(model, TOLD_TO_DDP))
    peft_model.delete_adapter("second")
    assert not any(".second." in name for name in getattr(model, TOLD_TO_DDP))
    assert buffers_in(model) <= set(getattr(model, TOLD_TO_DDP))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_ddp_is_told_of_the_buffers_of_native_adapters():
    model = build("llama")
    model.add_adapter(ChildTuningConfig(variant="random", target_modules=["q_proj"]), "default")
    model.add_adapter(ChildTuningConfig(variant="random", target_modules=["q_proj", "k_proj"]), "second")
    assert len(buffers_in(model)) == 2 + 4
    assert buffers_in(model) <= set(getattr(model, TOLD_TO_DDP))


def test_what_others_told_ddp_stays_and_nothing_else_is_told():
    base = build("llama")
    plain = set(vars(base))
    model = get_peft_model(base, config_for("llama", variant="random"))
    assert {name for name in getattr(model, TOLD_TO_DDP) if "child_" not in name} == set()
    model.unload()
    assert not getattr(base, TOLD_TO_DDP)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(base, ["model.norm.weight"])
    model = get_peft_model(base, config_for("llama", variant="random"))
    assert "model.norm.weight" in getattr(model, TOLD_TO_DDP)
    assert buffers_in(model) <= set(getattr(model, TOLD_TO_DDP))
    assert not child_tuning_layers(model.unload())
    assert getattr(base, TOLD_TO_DDP) == ["model.norm.weight"]
    assert set(vars(base)) - plain <= {TOLD_TO_DDP}
