"""The promises of the method: what moves, what does not, and that merging changes nothing else."""

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model

from peft_child import select_child_network
from peft_child.layers.layer import child_tuning_layers

from .. import reference
from ..helpers import (
    assert_same,
    child_of,
    chosen_model,
    config_for,
    in_threads,
    logits,
    move,
    snapshot,
    train,
)
from ..problems import PROBLEMS, batch_of, build


pytestmark = pytest.mark.usefixtures("granularity")

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd_momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, foreach=False),
    "adamw_foreach": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_after_training_only_the_child_network_has_moved(name, granularity):
    base = build(name)
    before = snapshot(base)
    model = chosen_model(name, base, task_type=None)
    child = child_of(model)
    decaying = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    train(model.train(), [batch_of(name, seed) for seed in range(3)], decaying)
    merged = model.merge_and_unload()

    targeted = sum(before[name].numel() for name in model_targets(name))
    size = sum(map(len, child.values()))
    assert size == round(0.3 * targeted) if granularity == "entry" else 0 < size <= round(0.5 * targeted)
    moved = 0
    for key, value in merged.named_parameters(remove_duplicate=True):
        different = (value.flatten() != before[key].flatten()).nonzero().flatten()
        moved += different.numel()
        assert torch.isin(different, child.get(key, torch.empty(0))).all()
    assert moved > 0
    assert merged.state_dict().keys() == before.keys()


def model_targets(name):
    layers = child_tuning_layers(chosen_model(name, task_type=None)).values()
    return [target for layer in layers for target in layer.targets_of("default").values()]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT means to; see test_peft_contract.py
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_base_is_never_written_without_a_merge(name, tmp_path):
    base = build(name)
    kept = {key: (value, value.detach().clone()) for key, value in base.named_parameters()}
    model = chosen_model(name, base)
    train(model.train(), [batch_of(name)] * 2)
    logits(model, batch_of(name))
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        logits(model, batch_of(name))
    model.set_adapter("default")
    own = {id(parameter) for parameter in model.parameters()}
    for value, copied in kept.values():
        assert id(value) in own
        assert torch.equal(value, copied)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["linear", "attention", "gpt2_tied", "bert"])
def test_training_equals_full_fine_tuning_with_a_masked_gradient(name, optimizer, accumulation, granularity):
    base = build(name)
    twin = copy.deepcopy(base)
    changes = {}
    if (name, granularity) == ("attention", "input_channel"):  # Adam magnifies rounding where biases have no gradient
        changes = {"target_modules": None, "target_parameters": ["in_proj_weight", "out_proj.weight"]}
    model = chosen_model(name, base, task_type=None, **changes).eval()
    batches = [batch_of(name, seed) for seed in range(6)]
    expected = reference.masked_training(twin, child_of(model), batches, OPTIMIZERS[optimizer], accumulation)
    train(model, batches, OPTIMIZERS[optimizer], accumulation)
    merged = model.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        # Weights of about 1 accumulate one rounding of 6e-8 at each step, deltas do not; Adam magnifies the
        # difference where gradients are of the size of its eps.
        torch.testing.assert_close(merged[key], value, rtol=0, atol=2e-6 if "adam" in optimizer else 5e-7)


@pytest.mark.filterwarnings("ignore:.*is trained whole, and in float16")
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_merged_output_equals_unmerged_output(name, dtype):
    model = get_peft_model(build(name, dtype=dtype), config_for(name, variant="random", init_weights=False))
    batch = batch_of(name, dtype=dtype)
    with model.disable_adapter():
        plain = logits(model, batch)
    unmerged = logits(model, batch)
    assert not torch.equal(plain, unmerged)
    model.merge_adapter()
    assert torch.equal(logits(model, batch), unmerged)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, batch), unmerged)
    assert not child_tuning_layers(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "attention", "experts", "llama_tied_head", "bert_container"])
def test_unmerge_restores_every_bit(name, dtype):
    base = build(name, dtype=dtype)
    before = snapshot(base)
    model = get_peft_model(base, config_for(name, variant="random", init_weights=False))
    for _ in range(1000 if name == "linear" else 20):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same(snapshot(model.unload()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_switching_among_adapters_restores_every_bit(dtype):
    base = build("linear", dtype=dtype)
    before = snapshot(base)
    config = partial(config_for, "linear", variant="random", init_weights=False)
    model = get_peft_model(base, config(seed=0), adapter_name="x")
    model.add_adapter("y", config(seed=1))
    model.add_adapter("z", config(seed=2))
    batch = batch_of("linear", dtype=dtype)
    first = {}
    for name in "xyzxyzxyz":
        model.set_adapter(name)
        result = logits(model, batch)
        model.merge_adapter()
        assert torch.equal(logits(model, batch), result)
        model.unmerge_adapter()
        assert torch.equal(first.setdefault(name, result), result)
    assert len({tuple(value.flatten().tolist()) for value in first.values()}) == 3
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(build("linear", dtype=dtype), batch))
    assert_same(snapshot(model.unload()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_active_adapters_add_up_and_round_once(dtype):
    base = build("linear", dtype=dtype)
    before = snapshot(base)
    config = partial(config_for, "linear", variant="random", init_weights=False, density=0.6)
    model = get_peft_model(base, config(seed=0), adapter_name="a")
    model.add_adapter("b", config(seed=1))
    model.base_model.set_adapter(["a", "b"])
    layer = next(iter(child_tuning_layers(model).values()))
    expected = before["body.0.weight"].float().flatten().clone()
    for adapter in "ab":
        expected[layer.indices(adapter, "weight")] += layer.named_deltas(adapter)[layer.targets_of(adapter)["weight"]]
    expected = expected.view(8, 6).to(dtype)
    assert torch.equal(layer.weight.clone(), expected)
    batch = batch_of("linear", dtype=dtype)
    both = logits(model, batch)
    model.merge_adapter(["b"])
    with pytest.warns(UserWarning, match="additionally merging a"):
        model.merge_adapter(["a"])  # order does not matter for the rounding
    assert torch.equal(model.base_model.model.body[0].base_layer.weight, expected)
    assert torch.equal(logits(model, batch), both)
    model.unmerge_adapter()
    assert_same(snapshot(model.unload()), before)


def deltas_in(model):
    layers = child_tuning_layers(model).values()
    return {name: delta.clone() for layer in layers for name, delta in layer.named_deltas("default").items()}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_the_last_step_is_in_whatever_comes_next(optimizer, tmp_path):
    model = chosen_model("bert").eval()
    train(model, [batch_of("bert")], OPTIMIZERS[optimizer])
    before = deltas_in(model)
    train(model, [batch_of("bert", 2)], OPTIMIZERS[optimizer])
    after = logits(model, batch_of("bert", 3))
    now = deltas_in(model)
    assert any(not torch.equal(now[name], value) for name, value in before.items())
    prefix, kind = "base_model.model.", ".child_delta.default"
    state = {key: value for key, value in model.state_dict().items() if kind in key}
    assert_same({key.removeprefix(prefix).replace(kind, ""): value for key, value in state.items()}, now)
    assert torch.equal(logits(model.merge_and_unload(), batch_of("bert", 3)), after)


@pytest.mark.parametrize("name", ["twice", "llama_tied_head", "attention", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(name, reentrant):
    model = chosen_model(name).eval()
    move(model)
    batch = batch_of(name)
    model(**batch).loss.backward()
    plain = gradients(model)

    def run(anchor):
        return model(**batch).loss + 0 * anchor

    anchor = torch.zeros((), requires_grad=True)
    torch.utils.checkpoint.checkpoint(run, anchor, use_reentrant=reentrant).backward()
    assert_same(gradients(model), plain)


def gradients(model):
    found = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    assert found
    return found


def test_two_models_on_one_base():
    base = build("linear")
    before = snapshot(base)
    first = get_peft_model(base, config_for("linear", variant="random"), adapter_name="a")
    with pytest.warns(UserWarning, match="second time|multiple adapters"):
        second = get_peft_model(base, config_for("linear", variant="random", seed=1), adapter_name="b")
    batch = batch_of("linear")
    second.set_adapter("b")
    train(second, [batch] * 2)
    trained = logits(second, batch)
    first.set_adapter("a")
    assert torch.equal(logits(first, batch), logits(build("linear"), batch))
    second.set_adapter("b")
    assert torch.equal(logits(second, batch), trained)
    assert_same(snapshot(second.unload()), before)


def test_two_threads_on_one_model():
    model = chosen_model("llama")
    move(model)
    batches = [batch_of("llama", seed) for seed in range(2)]
    expected = [logits(model, batch) for batch in batches]
    model(**batches[0]).loss.backward()
    gradient = gradients(model)
    wrong = []

    def work(which):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(model(**batches[which]).logits, expected[which]):
                    wrong.append(which)

    in_threads(work, 2)
    assert not wrong
    model(**batches[0]).loss.backward()
    assert_same(gradients(model), gradient)


def test_autograd_keeps_no_more_than_for_lora():
    from peft import LoraConfig

    from ..tensors.test_compose import saved_bytes

    def kept(config):
        model = get_peft_model(build("llama"), config)
        batch = batch_of("llama")
        own = [*model.parameters(), *model.buffers()]
        return saved_bytes(lambda: model(**batch).loss, own)[0]

    lora = kept(LoraConfig(r=1, target_modules="all-linear"))
    ours = kept(config_for("llama", variant="random"))
    weights = sum(parameter.numel() * 4 for key, parameter in build("llama").named_parameters() if "proj" in key)
    assert ours <= lora
    assert weights > lora / 4  # else a kept copy would not show


@pytest.mark.parametrize("name", ["linear", "llama", "bert"])
def test_random_children_differ_between_layers_and_not_between_processes(name):
    first, again, other = (child_of(chosen_model(name, variant="random", seed=seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    assert any(not torch.equal(first[key], other.get(key, torch.empty(0))) for key in first)
    if name == "llama":
        shape = "model.layers.{}.self_attn.q_proj.weight"
        assert not torch.equal(first[shape.format(0)], first[shape.format(1)])


def test_random_child_is_the_same_in_a_new_process(granularity):
    import subprocess
    import sys

    code = (
        "from tests.helpers import chosen_model, child_of;"
        f"settings = dict(variant='random', density=0.5, granularity='{granularity}');"
        "print([i.tolist() for i in child_of(chosen_model('llama', **settings)).values()])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = [indices.tolist() for indices in child_of(chosen_model("llama", variant="random", density=0.5)).values()]
    assert printed.strip() == str(here)


def test_a_second_choice_before_training_replaces_the_first(granularity):
    model = chosen_model("bert")
    first = child_of(model)
    select_child_network(model, [batch_of("bert", 5)], progress_bar=False)
    second = child_of(model)
    assert first.keys() != second.keys() or any(not torch.equal(first[name], second[name]) for name in first)
    if granularity == "entry":
        assert sum(map(len, first.values())) == sum(map(len, second.values()))
    train(model, [batch_of("bert")])
    assert all(layer.is_trained("default") for layer in child_tuning_layers(model).values() if child_of(layer))
