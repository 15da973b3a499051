"""Training with DeepSpeed's ZeRO in two processes, in an environment of its own; see `make test-deepspeed`."""

import os
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig

from peft_child import ChildTuningCallback, keep_largest, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors import distributed as distributed_module

from ..helpers import assert_same, checkpoint_activations, child_of, config_for, logits, settings_of, snapshot, train
from ..problems import PROBLEMS, batch_of, build, tiny_llama
from ..ranks import base_of, batches, on_two_ranks, train_with
from .test_trainer import Rows, trainer_for


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which looks for devices
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed; see make test-deepspeed")

pytestmark = pytest.mark.slow  # two processes each

STAGES = (1, 2, 3)
CASES = [(name, variant) for name in ("llama", "bert") for variant in ("task_driven", "channels", "task_free")]


def zero(stage, **changes):
    """A configuration in which ZeRO-3 partitions the smallest parameter as well."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own has to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # by default it clips
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **changes,
    }


def partitioned(base):
    deepspeed.zero.Init(module=base, config_dict_or_path=zero(3))
    assert all(not parameter.numel() for parameter in base.parameters())
    return base


def adapted(base, name, variant, rank=None):
    torch.manual_seed(1)
    changes = settings_of(variant)
    model = get_peft_model(base, config_for(name, **changes)).train()
    if changes["variant"] == "task_driven":
        select_child_network(model, batches(name, rank)[:2], progress_bar=False)
    return model


def let_deepspeed_warn():
    for category in (UserWarning, FutureWarning, ResourceWarning):
        warnings.filterwarnings("ignore", category=category)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def engine_of(model, stage, make_optimizer=adamw):
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=zero(stage), dist_init_required=False)[0]


def train_engine(engine, found):
    for batch in found:
        engine.backward(engine(**batch).loss)
        engine.step()


def whole(model):
    """The state dict in one piece."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return snapshot(model)


def assert_trained_alike(after, alone, found, make_optimizer=adamw):
    """What was trained in two processes is what one process trains with whole batches."""
    before = snapshot(alone)
    train(alone, found, make_optimizer)
    expected = snapshot(alone)
    assert after.keys() == expected.keys()
    assert any("child_delta" in key and not torch.equal(expected[key], before[key]) for key in after)
    for key, value in after.items():
        if torch.equal(before[key], expected[key]):
            assert torch.equal(value, before[key])
        else:  # steps of 1e-2; AdamW magnifies the rounding of gradients that are near its eps
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)


@contextmanager
def counted_gathers(parameters):
    """A list of the entries of every parameter that is gathered meanwhile."""
    gathered = []

    def counting(all_gather):
        def count(param_list=None, **kwargs):
            gathered.extend(each.ds_numel for each in param_list if each.ds_status.name == "NOT_AVAILABLE")
            return all_gather(param_list, **kwargs)

        return count

    own = {parameter: parameter.all_gather for parameter in parameters if hasattr(parameter, "ds_id")}
    for parameter, all_gather in own.items():
        parameter.all_gather = counting(all_gather)
    try:
        yield gathered
    finally:
        for parameter, all_gather in own.items():
            parameter.all_gather = all_gather


def train_engines(folder):
    let_deepspeed_warn()
    rank = distributed.get_rank()
    found = {}
    for stage in STAGES:
        for name, variant in CASES:
            case = f"{stage} {name} {variant}"
            model = adapted(base_of(name), name, variant, rank)
            engine = engine_of(model, stage)
            train_engine(engine, batches(name, rank))
            frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if stage == 3:
                assert not sum(parameter.numel() for parameter in [*frozen, *trained])  # all is released
            with counted_gathers([*frozen, *trained]) as gathered:
                model.save_pretrained(folder / case, is_main_process=rank == 0)
            assert sum(gathered) == (stage == 3) * sum(getattr(each, "ds_numel", 0) for each in trained)
            found[case] = whole(model)
            engine.eval()
            with torch.no_grad():
                found[f"logits {case}"] = engine(**batches(name)[0]).logits
    return found


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    first, second = on_two_ranks(train_engines, tmp_path, timeout=600)
    assert_same(first["3 bert channels"], second["3 bert channels"])
    for stage in STAGES:
        for name, variant in CASES:
            case = f"{stage} {name} {variant}"
            alone = adapted(base_of(name), name, variant)
            assert_trained_alike(first[case], alone, batches(name))
            alone.load_state_dict(first[case])
            assert torch.equal(first[f"logits {case}"], logits(alone, batches(name)[0]))
            # Saved in two processes without gathering more than what is trained, and loaded in one.
            loaded = PeftModel.from_pretrained(base_of(name), tmp_path / case)
            assert torch.equal(logits(loaded, batches(name)[0]), logits(alone, batches(name)[0]))


def train_partitioned(folder):
    """Adapters made, chosen and loaded when the base is partitioned already."""
    let_deepspeed_warn()
    rank = distributed.get_rank()
    found = {}
    for name, variant in CASES:
        base = partitioned(base_of(name))
        model = adapted(base, name, variant, rank)
        assert not sum(parameter.numel() for parameter in base.parameters() if hasattr(parameter, "ds_id"))
        found["child", name, variant] = child_of(model) if variant != "task_free" else {}
        train_engine(engine_of(model, 3), batches(name, rank))
        found[name, variant] = whole(model)
        model.save_pretrained(folder / f"{name} {variant}", is_main_process=rank == 0)
        distributed.barrier()
        again = PeftModel.from_pretrained(partitioned(base_of(name)), folder / f"{name} {variant}", is_trainable=True)
        train_engine(engine_of(again.train(), 3), batches(name, rank)[:1])  # goes on
    return found


def test_child_networks_are_chosen_and_loaded_in_a_model_that_is_partitioned(tmp_path):
    first, second = on_two_ranks(train_partitioned, tmp_path, timeout=600)
    for name, variant in CASES:
        assert_same(first[name, variant], second[name, variant])
        alone = adapted(base_of(name), name, variant)
        if variant != "task_free":
            assert_same(first["child", name, variant], child_of(alone))
        assert_trained_alike(first[name, variant], alone, batches(name))


def train_accelerated(folder):
    let_deepspeed_warn()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    rank = distributed.get_rank()
    name, variant, stage = (folder / "case").read_text().split()
    plugin = DeepSpeedPlugin(hf_ds_config=zero(int(stage), gradient_clipping=1e9))
    gloo = InitProcessGroupKwargs(backend="gloo")  # without a GPU accelerate would see one process
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
    assert accelerator.num_processes == 2
    model = adapted(base_of(name), name, variant, rank)
    trained = train_with(accelerator, model, DataLoader(Rows(name), batch_size=4))
    trained.save_pretrained(folder / "saved", is_main_process=accelerator.is_main_process)
    return whole(trained)


@pytest.mark.parametrize(("name", "variant"), [("bert", "task_driven"), ("llama", "channels")])
@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_trains_as_one_process_with_the_whole_batch(tmp_path, stage, name, variant):
    (tmp_path / "case").write_text(f"{name} {variant} {stage}")
    first, second = on_two_ranks(train_accelerated, tmp_path, timeout=300)
    assert_same(first, second)
    alone = adapted(base_of(name), name, variant)
    assert_trained_alike(first, alone, DataLoader(Rows(name), batch_size=8))
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path / "saved")
    alone.load_state_dict(first)
    assert torch.equal(logits(loaded, batches(name)[0]), logits(alone, batches(name)[0]))


# The Trainer would multiply the loss by the number of processes, for models that divide it by that of all tokens.
OF_TRAINERS = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "logging_steps": 1}


def deepspeed_trainer(model, folder, stage, **changes):
    config = zero(stage, gradient_clipping="auto", gradient_accumulation_steps="auto")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")  # without a GPU the Trainer would see one process
    own = {"use_configured_state": True}
    changes |= {"accelerator_config": own, "deepspeed": config, "use_cpu": False, **OF_TRAINERS}
    trainer = trainer_for(model, folder, **changes)
    assert trainer.args.world_size == 2
    return trainer


def train_with_trainer(folder):
    """Whole runs, and runs that are resumed from their checkpoints."""
    let_deepspeed_warn()
    rank = distributed.get_rank()
    stage, found = int((folder / "stage").read_text()), {}
    for variant in ("task_driven", "channels", "task_free"):
        model = adapted(base_of("bert"), "bert", variant, rank)
        trainer = deepspeed_trainer(model, folder / variant, stage)
        trainer.add_callback(ChildTuningCallback())
        trainer.train()
        logged = [entry["child/norm"] for entry in trainer.state.log_history if "child/norm" in entry]
        steps = {step for layer in child_tuning_layers(model).values() for step in layer.counted_steps()}
        resumed = adapted(base_of("bert"), "bert", variant, rank)
        again = deepspeed_trainer(resumed, folder / f"{variant} again", stage)
        again.train(resume_from_checkpoint=str(folder / variant / "checkpoint-3"))
        found[variant] = whole(model), whole(resumed), logged, steps
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer_trains_as_in_one_process_and_resumes_exactly(tmp_path, stage):
    (tmp_path / "stage").write_text(str(stage))
    first, second = on_two_ranks(train_with_trainer, tmp_path, timeout=600)
    for variant, (after, resumed, logged, steps) in first.items():
        assert_same(after, second[variant][0])
        assert_same(resumed, after)
        alone = adapted(base_of("bert"), "bert", variant)
        trainer = trainer_for(alone, tmp_path / "alone", per_device_train_batch_size=8, **OF_TRAINERS)
        trainer.add_callback(ChildTuningCallback())
        trainer.train()
        expected = snapshot(alone)
        assert after.keys() == expected.keys()
        for key, value in after.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)
        norms = [entry["child/norm"] for entry in trainer.state.log_history if "child/norm" in entry]
        assert logged == pytest.approx(norms, rel=1e-3)
        assert steps == ({6} if variant == "task_free" else set())
        loaded = PeftModel.from_pretrained(base_of("bert"), tmp_path / variant / "checkpoint-6")
        alone.load_state_dict(after)
        assert torch.equal(logits(loaded, batches("bert")[0]), logits(alone, batches("bert")[0]))


UNUSUAL = ("tied", "checkpointed", "attention", "attention_output", "experts", "conv2d", "twice")


def unusual(case):
    """Tied weights, checkpointed activations, weights that a parent reads, and other kinds of modules."""
    torch.manual_seed(0)
    if case in PROBLEMS:
        return get_peft_model(build(case), config_for(case, variant="random")).train()
    base = tiny_llama(tie_word_embeddings=case == "tied")
    if case == "checkpointed":
        checkpoint_activations(base)
    config = config_for("llama", variant="random", target_modules=["embed_tokens", "lm_head", "q_proj", "norm"])
    return get_peft_model(base, config).train()


def batches_of(case, rank=None):
    if case not in PROBLEMS:
        return batches("llama", rank)
    found = [batch_of(case, seed) for seed in range(5)]
    if rank is None:
        return found
    return [{key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()} for batch in found]


def train_unusual(folder):
    let_deepspeed_warn()
    rank = distributed.get_rank()
    found = {}
    for case in UNUSUAL:
        model = unusual(case)
        train_engine(engine_of(model, 3, sgd), batches_of(case, rank))  # AdamW would magnify gradients of 0
        found[case] = whole(model)
    return found


def test_weights_that_other_modules_use_are_gathered_for_them(tmp_path):
    first, second = on_two_ranks(train_unusual, tmp_path, timeout=300)
    for case in UNUSUAL:
        assert_same(first[case], second[case])
        assert_trained_alike(first[case], unusual(case), batches_of(case), sgd)


def load_partitioned(folder):
    """The base comes from transformers, which partitions it while it is loaded."""
    let_deepspeed_warn()
    rank = distributed.get_rank()
    found = {}
    kinds = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
    config = HfDeepSpeedConfig(zero(3))
    for name, kind in kinds.items():
        base = kind.from_pretrained(folder / name)
        assert config.is_zero3()
        assert not sum(parameter.numel() for parameter in base.parameters())
        model = adapted(base, name, "task_driven", rank)
        found[name] = child_of(model)
        train_engine(engine_of(model, 3), batches(name, rank))
        model.save_pretrained(folder / f"{name} saved", is_main_process=rank == 0)
        found[f"{name} trained"] = whole(model)
    return found


def test_a_base_that_transformers_has_partitioned_is_trained_alike(tmp_path):
    for name in ("llama", "bert"):
        base_of(name).save_pretrained(tmp_path / name)
    first, _ = on_two_ranks(load_partitioned, tmp_path, timeout=300)
    for name in ("llama", "bert"):
        alone = adapted(base_of(name), name, "task_driven")
        assert_same(first[name], child_of(alone))
        assert_trained_alike(first[f"{name} trained"], alone, batches(name))
        loaded = PeftModel.from_pretrained(base_of(name), tmp_path / f"{name} saved")
        alone.load_state_dict(first[f"{name} trained"])
        assert torch.equal(logits(loaded, batches(name)[0]), logits(alone, batches(name)[0]))


def raised(call):
    """The exception of a call, as seen here."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refuse(folder):
    let_deepspeed_warn()
    rank = distributed.get_rank()
    errors = {}
    other = get_peft_model(base_of("bert"), config_for("bert"))
    select_child_network(other, batches("bert")[4:], progress_bar=False)
    other.save_pretrained(folder / f"other {rank}")
    no_engine = adapted(partitioned(base_of("bert")), "bert", "task_driven", rank)
    layer = next(iter(child_tuning_layers(no_engine).values()))
    errors["no engine"] = raised(lambda: layer(torch.zeros(2, 16)))
    for stage in STAGES:
        model = adapted(base_of("bert"), "bert", "task_driven", rank)
        engine = engine_of(model, stage)
        train_engine(engine, batches("bert", rank)[:2])
        before = whole(model)
        engine.save_checkpoint(folder / f"checkpoint {stage}")
        chosen_otherwise = get_peft_model(base_of("bert"), config_for("bert")).train()
        select_child_network(chosen_otherwise, batches("bert", rank)[3:], progress_bar=False)
        resumed = engine_of(chosen_otherwise, stage)
        errors |= {
            f"choose {stage}": raised(lambda: select_child_network(model, batches("bert")[:1])),  # noqa: B023
            f"choose in engine {stage}": raised(lambda: select_child_network(engine, batches("bert")[:1])),  # noqa: B023
            f"thin {stage}": raised(lambda: keep_largest(model, 0.1)),  # noqa: B023
            f"load {stage}": raised(lambda: model.load_adapter(folder / f"other {rank}", "default")),  # noqa: B023
            f"resume {stage}": raised(lambda: resumed.load_checkpoint(folder / f"checkpoint {stage}")),  # noqa: B023
        }
        if stage == 3:
            errors["merge"] = raised(model.merge_adapter)
        assert_same(whole(model), before)
        train_engine(engine, batches("bert", rank)[2:3])  # goes on
    late = get_peft_model(base_of("bert"), config_for("bert", variant="random", modules_to_save=["classifier"]))
    engine = engine_of(late, 2)
    late.add_adapter("late", config_for("bert", variant="random"))
    late.set_adapter("late")
    errors["late"] = raised(lambda: train_engine(engine, batches("bert", rank)[:1]))
    return errors


def test_what_an_engine_cannot_do_is_refused(tmp_path):
    first, second = on_two_ranks(refuse, tmp_path, timeout=600)
    assert first == second
    assert "Parameter 'bert.encoder" in first["no engine"]
    for case in ("no engine", "merge"):
        assert first[case].startswith("RuntimeError: ")
        assert (
            "is partitioned over processes (ZeRO-3) and not gathered, so that it cannot be read: call" in first[case]
        )
    for stage in STAGES:
        for case in ("choose", "choose in engine", "thin"):
            assert "must be chosen before DeepSpeed takes the model over" in first[f"{case} {stage}"]
        assert "belongs to an engine of DeepSpeed, whose optimizer would not see the change" in first[f"load {stage}"]
        assert "The checkpoint has another child network of 'bert.encoder" in first[f"resume {stage}"]
    assert first["late"] is not None


def fail_on_one_rank(folder):
    """One rank has a bad example, or another file; both ranks have to notice, and can go on."""
    let_deepspeed_warn()
    rank = distributed.get_rank()
    model = get_peft_model(partitioned(base_of("bert")), config_for("bert"))
    bad = [{"input_ids": torch.full((4, 6), 99), "labels": torch.zeros(4, dtype=torch.long)}]  # no such token
    errors = [raised(lambda: select_child_network(model, bad if rank else batches("bert")[:1], progress_bar=False))]
    other = get_peft_model(base_of("bert"), config_for("bert", variant="random", seed=rank))
    other.save_pretrained(folder / f"seed {rank}")
    base = partitioned(base_of("bert"))
    errors.append(raised(lambda: PeftModel.from_pretrained(base, folder / f"seed {rank}")))
    select_child_network(model, batches("bert", rank)[:1], progress_bar=False)
    return errors


def save_what_one_rank_has(folder):
    """As accelerate's documentation does it, with a state dict that only the first rank gets."""
    let_deepspeed_warn()
    rank = distributed.get_rank()
    model = adapted(base_of("bert"), "bert", "task_driven", rank)
    engine = engine_of(model, 3)
    train_engine(engine, batches("bert", rank)[:1])
    state_dict = engine._zero3_consolidated_16bit_state_dict()
    distributed_module.check_all_come.__defaults__ = (timedelta(seconds=3),)
    found = raised(lambda: model.save_pretrained(folder / "saved", state_dict=state_dict, is_main_process=rank == 0))
    if rank == 0:
        time.sleep(6)  # its end would be noticed as well
    return found


def test_a_rank_that_gathers_alone_does_not_wait_for_ever(tmp_path):
    first, second = on_two_ranks(save_what_one_rank_has, tmp_path, timeout=120)
    assert first is None
    assert second.startswith("RuntimeError: Not every rank gathers the child network")
    PeftModel.from_pretrained(base_of("bert"), tmp_path / "saved")


def test_an_error_on_one_rank_is_raised_on_both(tmp_path):
    first, second = on_two_ranks(fail_on_one_rank, tmp_path, timeout=120)
    assert first == second
    assert "(rank 1 of 2)" in first[0]
    assert "Every process must have the same tensors of the adapter file" in first[1]
