"""Training with every tensor sharded over two processes (FSDP2)."""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peft_child import estimate_fisher, keep_largest, select_child_network, weight_magnitudes
from peft_child.tensors.sharded_topk import select_largest_of_shards

from .. import reference
from ..helpers import (
    assert_same,
    checkpoint_activations,
    child_of,
    config_for,
    logits,
    move,
    settings_of,
    snapshot,
    train,
)
from ..integrations.test_trainer import trainer_for
from ..problems import batch_of, build, tiny_bert
from ..ranks import base_of, batches, on_two_ranks


pytestmark = pytest.mark.slow  # two processes each

CASES = {  # model, how its child network is chosen, and how activations are checkpointed
    "llama": ("llama", "random", None),
    "llama checkpointed": ("llama", "task_driven", "wrapper"),
    "bert": ("bert", "task_driven", None),
    "bert checkpointed": ("bert", "task_free", "transformers"),
    "bert loaded": ("bert", "loaded", None),
    "bert channels": ("bert", "channels", None),
    "llama channels checkpointed": ("llama", "channels", "wrapper"),
}


def model_for(name, variant, folder, rank=None):
    if variant == "loaded":
        model = get_peft_model(base_of(name), config_for(name, variant="random", seed=5))
        move(model)
        model.save_pretrained(folder / f"seed5 {rank}")
        return PeftModel.from_pretrained(base_of(name), folder / f"seed5 {rank}", is_trainable=True).train()
    changes = settings_of(variant)
    model = get_peft_model(base_of(name), config_for(name, **changes)).train()
    if changes["variant"] == "task_driven":
        select_child_network(model, batches(name, rank)[:2], progress_bar=False)
    return model


def shard(model, checkpointing=None):
    """Shard every block of a model, and then the rest."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = base.model.layers if hasattr(base, "lm_head") else base.bert.encoder.layer
    if checkpointing == "transformers":
        checkpoint_activations(base)
    for index, layer in enumerate(layers):
        if checkpointing == "wrapper":
            layers[index] = checkpoint_wrapper(layer)
        fully_shard(layers[index])
    return fully_shard(model)


def whole(model):
    """The state dict of a sharded model in one piece."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


@contextmanager
def counted_gathers():
    """A list of the entries of every tensor that is gathered meanwhile."""
    gathered, full_tensor = [], DTensor.full_tensor

    def counted(tensor):
        gathered.append(tensor.numel())
        return full_tensor(tensor)

    DTensor.full_tensor = counted
    try:
        yield gathered
    finally:
        DTensor.full_tensor = full_tensor


def train_sharded(folder):
    rank = distributed.get_rank()
    found = {}
    for case, (name, variant, checkpointing) in CASES.items():
        model = shard(model_for(name, variant, folder, rank), checkpointing)
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        train(model, batches(name, rank))
        with counted_gathers() as gathered:
            model.save_pretrained(folder / case, is_main_process=rank == 0)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        found[case] = whole(model), child_of(model), sum(gathered), trained
    return found


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    first, second = on_two_ranks(train_sharded, tmp_path)
    for case, (name, variant, _) in CASES.items():
        after, child, gathered, trained = first[case]
        assert_same(after, second[case][0])
        alone = model_for(name, variant, tmp_path)
        assert_same(child, child_of(alone))
        before = snapshot(alone)
        train(alone, batches(name))
        expected = snapshot(alone)
        assert after.keys() == expected.keys()
        assert any("child_delta" in key and not torch.equal(after[key], before[key]) for key in after)
        for key, value in after.items():
            if torch.equal(before[key], expected[key]):
                assert torch.equal(value, before[key])
            else:  # steps of 1e-2; AdamW magnifies the rounding of gradients that are near its eps
                torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)
        # Saved in two processes without gathering more than what is trained, and loaded in one.
        assert gathered == trained
        loaded = PeftModel.from_pretrained(base_of(name), tmp_path / case)
        alone.load_state_dict(after)
        assert torch.equal(logits(loaded, batches(name)[0]), logits(alone, batches(name)[0]))


def raised(call):
    """The exception of a call, as seen here."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refuse(folder):
    rank = distributed.get_rank()
    model = shard(model_for("bert", "task_driven", folder))
    other = get_peft_model(base_of("bert"), config_for("bert"))
    select_child_network(other, batches("bert")[4:], progress_bar=False)
    other.save_pretrained(folder / f"other {rank}")
    before = whole(model)
    inner = get_peft_model(base_of("bert"), config_for("bert", variant="random")).train()
    fully_shard(inner.get_base_model().bert.encoder.layer[0].attention.self.query.base_layer)
    late = get_peft_model(shard(base_of("bert")), config_for("bert", variant="random"))
    errors = {
        "load another": raised(lambda: model.load_adapter(folder / f"other {rank}", "default")),
        "merge": raised(model.merge_adapter),
        "merge and unload": raised(model.merge_and_unload),
        "thin": raised(lambda: keep_largest(model, 0.1)),
        "inner": raised(lambda: inner(**batches("bert")[0])),
        "train late": raised(lambda: late.train()(**batches("bert")[0])),
    }
    assert_same(whole(model), before)
    assert list(model.peft_config) == ["default"]
    train(model, batches("bert", rank)[:1])  # goes on
    return errors


def test_what_cannot_be_done_with_shards_is_refused(tmp_path):
    first, second = on_two_ranks(refuse, tmp_path)
    assert first == second
    assert "(a DTensor): save the adapter, and keep its largest changes in one process." in first["thin"]
    assert "(a DTensor): give its adapter another child network before sharding the model." in first["load another"]
    assert "was added to a model that was sharded already" in first["train late"]
    for case in ("merge", "merge and unload", "inner"):
        assert "Linear is sharded (a DTensor), so that it cannot be composed or merged: apply" in first[case]


def load_onto_shards(folder):
    """Adapters that were trained elsewhere, for inference, and one in the place of another of the same size.

    No head here: PEFT copies `modules_to_save` with their shards, which FSDP2 does not know.
    """
    rank = distributed.get_rank()
    for seed in (1, 2):
        model = get_peft_model(base_of("llama"), config_for("llama", variant="random", seed=seed))
        torch.manual_seed(seed)
        move(model)
        model.save_pretrained(folder / f"{seed} {rank}")
    sharded = shard(get_peft_model(base_of("llama"), config_for("llama", variant="random", seed=1)))
    sharded.load_adapter(folder / f"1 {rank}", "default")
    sharded.load_adapter(folder / f"2 {rank}", "second")
    batch = batches("llama")[0]
    deltas = [parameter for name, parameter in sharded.named_parameters() if "child_delta.default" in name]
    assert all(isinstance(delta, DTensor) for delta in deltas)
    found = [logits(sharded, batch)]
    sharded.set_adapter("second")
    found.append(logits(sharded, batch))
    sharded.save_pretrained(folder / "again", selected_adapters=["second"], is_main_process=rank == 0)
    return found


def test_adapters_are_loaded_onto_a_sharded_model(tmp_path):
    first, second = on_two_ranks(load_onto_shards, tmp_path)
    for seed, one, other in zip((1, 2), first, second, strict=True):
        alone = PeftModel.from_pretrained(base_of("llama"), tmp_path / f"{seed} 0")
        assert torch.equal(one, logits(alone, batches("llama")[0]))
        assert torch.equal(one, other)
    assert not torch.equal(*first)
    again = PeftModel.from_pretrained(base_of("llama"), tmp_path / "again" / "second")
    assert torch.equal(logits(again, batches("llama")[0]), first[1])


def choose_on_shards(folder):
    """Scores and choice in shards; what was chosen is saved there, and trained in another model."""
    rank = distributed.get_rank()
    model = shard(unchosen("per_example"))
    with counted_gathers() as gathered:
        select_child_network(model, [rows(*indices) for indices in SHARES[rank]], progress_bar=False)
    model.save_pretrained(folder / "chosen", is_main_process=rank == 0)
    scores = estimate_fisher(model, [rows(*indices) for indices in SHARES[rank]], progress_bar=False)
    ready = unchosen("per_example")  # not sharded, with scores that are
    select_child_network(ready, scores=scores)
    assert_same(child_of(ready), child_of(model))
    expected = reference.largest({name: score.full_tensor() for name, score in scores.items()}, len_of(model))
    assert_same(child_of(model), {name: indices for name, indices in expected.items() if len(indices)})
    constant = {name: torch.zeros_like(score) for name, score in scores.items()}
    ties = select_largest_of_shards({name: score + 1 for name, score in constant.items()}, 1000)
    nothing = raised(lambda: select_child_network(unchosen("per_example"), scores=constant))
    negative = {name: score - rank for name, score in constant.items()}
    bad = raised(lambda: select_child_network(unchosen("per_example"), scores=negative))
    largest = max(parameter.numel() for parameter in model.parameters())
    return child_of(model), max(gathered), largest, ties, (nothing, bad)


def len_of(model):
    return sum(len(indices) for indices in child_of(model).values())


def test_the_choice_of_a_sharded_model_is_that_of_one_process(tmp_path):
    first, second = on_two_ranks(choose_on_shards, tmp_path)
    child, gathered, largest, ties, errors = first
    assert_same(child, second[0])
    assert gathered <= largest  # one weight at a time, for its fingerprint
    alone = unchosen("per_example")
    select_child_network(alone, [rows(*indices) for indices in IN_ROUNDS], progress_bar=False)
    same = sum(int(torch.isin(child[name], indices).sum()) for name, indices in child_of(alone).items())
    assert same >= 0.999 * len_of(alone)  # gradients of one process are rounded in another order
    loaded = PeftModel.from_pretrained(base_of("bert"), tmp_path / "chosen", is_trainable=True)
    assert_same(child_of(loaded), child)
    # Ties go to the earlier tensor, then to the smaller index, as in one process.
    for found in (ties, second[3]):
        names = list(found)
        flat = torch.cat([torch.ones(len(found[name])) for name in names])
        assert len(flat) == 1000
        assert all(torch.equal(found[name], torch.arange(len(found[name]))) for name in names)
    assert errors == second[4]
    assert errors[0].startswith("ValueError: No score is positive: the loss does not depend on any targeted weight.")
    assert "Scores must be finite and not negative" in errors[1]
    assert "(rank 1 of 2)" in errors[1]


def choose_channels_on_shards(folder):
    rank = distributed.get_rank()
    found = {}
    for fisher in ("per_example", "authors"):
        model = shard(unchosen(fisher, granularity="input_channel"))
        data = [rows(*indices) for indices in SHARES[rank]]
        with counted_gathers() as gathered:
            scores = estimate_fisher(model, data, progress_bar=False)
        assert not gathered
        select_child_network(model, data, progress_bar=False)
        model.save_pretrained(folder / fisher, is_main_process=rank == 0)
        found[fisher] = scores, child_of(model)
    base = base_of("bert")
    config = config_for("bert", granularity="input_channel", target_modules=["LayerNorm"])
    base.bert.encoder.layer[0].attention.output.LayerNorm.forward = torch.tanh  # of no common kind
    error = raised(lambda: estimate_fisher(shard(get_peft_model(base, config)), data, progress_bar=False))
    return found, error


def test_input_channels_are_chosen_in_a_sharded_model_as_in_one_process(tmp_path):
    (first, error), (second, second_error) = on_two_ranks(choose_channels_on_shards, tmp_path)
    for fisher, (scores, child) in first.items():
        assert_same(scores, second[fisher][0])
        assert_same(child, second[fisher][1])
        alone = unchosen(fisher, granularity="input_channel")
        data = [rows(*indices) for indices in IN_ROUNDS]
        expected = estimate_fisher(alone, data, progress_bar=False)
        for name, score in scores.items():
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-12)
        select_child_network(alone, scores=scores)
        assert_same(child_of(alone), child)
        loaded = PeftModel.from_pretrained(base_of("bert"), tmp_path / fisher, is_trainable=True)
        assert_same(child_of(loaded), child)
    assert error == second_error
    assert "LayerNorm.weight' are scored by gradients, since there is no formula for its module" in error


# Three of the eight examples are on rank 0 and five on rank 1.
SHARES = ((0, 1), (2,)), ((3, 4, 5), (6, 7))
IN_ROUNDS = (0, 1), (3, 4, 5), (2,), (6, 7)


def rows(*indices):
    return {key: value[list(indices)] for key, value in batches("bert")[0].items()}


def unchosen(fisher, dropout=0.0, **changes):
    torch.manual_seed(0)
    base = tiny_bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return get_peft_model(base, config_for("bert", fisher=fisher, **changes))


def scored(model, examples, **options):
    data = [rows(*indices) for indices in examples]
    torch.manual_seed(3)
    return estimate_fisher(model, data, progress_bar=False, **options)


def score_sharded(folder):
    mine = SHARES[distributed.get_rank()]
    found = {}
    for case, (fisher, dropout, options) in SCORED.items():
        model = shard(unchosen(fisher, dropout))
        before = whole(model), [parameter.requires_grad for parameter in model.parameters()]
        scores = scored(model, mine, **options)
        assert all(isinstance(score, DTensor) for score in scores.values())
        found[case] = {name: score.full_tensor() for name, score in scores.items()}
        assert_same(whole(model), before[0])
        assert [parameter.requires_grad for parameter in model.parameters()] == before[1]
        assert all(parameter.grad is None for parameter in model.parameters())
        found[f"{case}: local"] = {name: score.to_local().clone() for name, score in scores.items()}
    scores = weight_magnitudes(model)
    found["magnitudes"] = {name: score.full_tensor() for name, score in scores.items()}
    found["magnitudes: local"] = {name: score.to_local().clone() for name, score in scores.items()}
    failing = [rows(0), {**rows(1), "input_ids": torch.full((1, 6), 99)}] if mine is SHARES[1] else [rows(2)] * 20
    error = raised(lambda: estimate_fisher(model, failing, progress_bar=False))
    return found, error


SCORED = {  # fisher, dropout and other options
    "per_example": ("per_example", 0.0, {}),
    "five": ("per_example", 0.0, {"num_examples": 5}),
    "authors": ("authors", 0.5, {}),
}


def test_scores_of_a_sharded_model_are_those_of_one_process(tmp_path):
    (first, error), (second, second_error) = on_two_ranks(score_sharded, tmp_path)
    alone = {
        "per_example": scored(unchosen("per_example"), IN_ROUNDS),
        "five": scored(unchosen("per_example"), [(0, 1, 2), (3, 4)]),
        "authors": scored(unchosen("authors", 0.5), IN_ROUNDS),  # the same dropout, in the same order
        "magnitudes": weight_magnitudes(unchosen("authors", 0.5)),
    }
    for case, expected in alone.items():
        assert_same(first[case], second[case])
        assert first[case].keys() == expected.keys()
        for name, score in first[case].items():
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-12)
            shards = [found[f"{case}: local"][name] for found in (first, second)]
            assert torch.equal(torch.cat(shards), score)
    assert error == "RuntimeError: IndexError: index out of range in self (rank 0, 1 of 2)"
    assert second_error == error


def pretend_to_have_accelerators():
    """Let accelerate shard on the CPU, where it would use DDP without a word."""
    init = PartialState.__init__

    def initialised(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = initialised


def accelerated(folder):
    """A loop of one's own through accelerate."""
    pretend_to_have_accelerators()
    rank = distributed.get_rank()
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        ),
    )
    model = model_for("llama", "random", folder)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule)
    for batch in batches("llama", rank):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    state_dict = accelerator.get_state_dict(model)  # on rank 0
    model.save_pretrained(folder / "gathered by accelerate", is_main_process=rank == 0, state_dict=state_dict)
    model.save_pretrained(folder / "gathered by us", is_main_process=rank == 0)
    return whole(model)


def test_accelerate_trains_as_one_process_with_the_whole_batch(tmp_path):
    first, second = on_two_ranks(accelerated, tmp_path)
    assert_same(first, second)
    alone = model_for("llama", "random", tmp_path)
    train(alone, batches("llama"))
    for name, value in snapshot(alone).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("gathered by accelerate", "gathered by us")]
    assert files[0].read_bytes() == files[1].read_bytes()


def resume(folder):
    """Through the Trainer, with dropout, checkpointing, and stopped in the middle of an epoch."""
    pretend_to_have_accelerators()
    settings = {
        "save_steps": 2,
        "fsdp": True,
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"], "activation_checkpointing": True},
    }

    def trainer_of(seed, output):
        model = get_peft_model(build("bert"), config_for("bert", variant="random", seed=seed))
        return trainer_for(model, folder / output, **settings)

    trainer = trainer_of(0, "whole")
    trainer.train()
    assert isinstance(trainer.model, FSDPModule)
    again = trainer_of(0, "again")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    other = trainer_of(1, "other")
    error = raised(lambda: other.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2")))
    return whole(trainer.model), whole(again.model), error


def test_resuming_the_trainer_equals_the_uninterrupted_run(tmp_path):
    (first, first_resumed, error), (second, second_resumed, second_error) = on_two_ranks(resume, tmp_path)
    assert_same(first, first_resumed)
    assert_same(second, second_resumed)
    assert_same(first, second)
    # Another child network than that of the checkpoint is noticed.
    assert error.startswith("RuntimeError: Error(s) in loading state_dict")
    assert second_error == error
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "whole" / "checkpoint-6")
    deltas = {name: value for name, value in snapshot(loaded).items() if "child_delta" in name}
    assert deltas
    assert_same(deltas, {name: first[name] for name in deltas})


@pytest.mark.parametrize("kind", ["child_delta", "child_index"])
def test_a_state_dict_that_lacks_a_part_of_the_child_network_is_not_saved(tmp_path, kind):
    model = get_peft_model(build("bert"), config_for("bert", variant="random"))
    state_dict = model.state_dict()
    del state_dict[next(key for key in state_dict if kind in key)]
    with pytest.raises(RuntimeError, match=r"state dict holds .* of child networks, the layers here have"):
        model.save_pretrained(tmp_path, state_dict=state_dict)


def test_adapters_are_saved_and_loaded_whatever_torch_wraps_around_layers(tmp_path):
    model = get_peft_model(build("bert"), config_for("bert", variant="random"))
    move(model)
    model.save_pretrained(tmp_path / "plain")
    layers = model.get_base_model().bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path / "wrapped")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("plain", "wrapped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    expected = logits(model, batch_of("bert"))
    move(model)
    assert not torch.equal(logits(model, batch_of("bert")), expected)
    model.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(logits(model, batch_of("bert")), expected)
