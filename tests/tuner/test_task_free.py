"""Child-Tuning_F: a random gradient mask at every optimizer step, over all weights or over a fixed child network."""

import copy
import io
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_child import ChildTuningConfig, next_gradient_mask, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.gradient_mask import GradientMask

from .. import reference
from ..helpers import assert_same, child_of, chosen_model, config_for, logits, snapshot, train
from ..problems import PROBLEMS, batch_of, build


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    # An eps well above rounding: the gradient of a key bias is zero but for rounding, which Adam would blow up.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0, eps=1e-5),
}


def model_of(name, base=None, density=0.4, **changes):
    return chosen_model(name, base, variant="task_free", density=density, **changes)


def factors(density, seed=0, every=1):
    """The literal mask of the paper: a Bernoulli variable divided by its probability."""

    def draw(step, name, numel):
        return GradientMask(density, seed, every, step).draw(name, numel) / density

    return draw


def steps_of(model):
    return {
        name: layer.gradient_mask("default", key).step
        for layer in child_tuning_layers(model).values()
        for key, name in layer.targets_of("default").items()
        if key in layer.child_mask["default"]
    }


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "child_delta" in name}


# The method


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["linear", "twice", "attention", "gpt2_tied", "bert"])
def test_training_equals_full_fine_tuning_with_the_literal_mask(name, optimizer, accumulation):
    base = build(name)
    twin = copy.deepcopy(base)
    model = model_of(name, base, task_type=None, seed=3).eval()
    batches = [batch_of(name, seed) for seed in range(20 * accumulation)]
    expected = reference.masked_training(
        twin, child_of(model), batches, OPTIMIZERS[optimizer], accumulation, factors(0.4, seed=3)
    )
    train(model, batches, OPTIMIZERS[optimizer], accumulation)
    merged = model.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        # As for a fixed child network: weights are rounded at each step, deltas are not.
        torch.testing.assert_close(merged[key], value, rtol=0, atol=2e-6)


def test_on_top_of_a_task_driven_child_the_masks_are_multiplied():
    base = build("bert")
    twin = copy.deepcopy(base)
    model = chosen_model("bert", base, task_type=None, gradient_density=0.5, seed=2, resample_every=2).eval()
    child = child_of(model)
    assert any(indices.numel() < twin.get_parameter(name).numel() for name, indices in child.items())
    batches = [batch_of("bert", seed) for seed in range(6)]

    def draw(step, name, numel):
        """The mask of a fixed child network is drawn over its own entries."""
        kept = GradientMask(0.5, 2, 2, step).draw(name, child[name].numel())
        return torch.zeros(numel).index_copy_(0, child[name], kept / 0.5)

    expected = reference.masked_training(twin, child, batches, OPTIMIZERS["sgd"], draw=draw)
    train(model, batches, OPTIMIZERS["sgd"])
    merged = model.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


def masks_by_channel(model, density, **settings):
    """The literal mask of whole input channels: an entry has that of its channel, counted among the trained ones."""
    child, layouts = child_of(model), {}
    for layer in child_tuning_layers(model).values():
        layouts |= layer.layouts("default")

    def draw(step, name, numel):
        channel = layouts[name].channel_of(child[name])
        trained = channel.unique().tolist()
        kept = GradientMask(density, step=step, **settings).draw(name, len(trained))
        factor = {number: float(kept[place]) / density for place, number in enumerate(trained)}
        return torch.zeros(numel).index_copy_(0, child[name], torch.tensor([factor[int(one)] for one in channel]))

    return draw


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "task_free", "density": 0.4},
        {"variant": "random", "density": 0.6, "gradient_density": 0.4},
    ],
    ids=["all", "fixed"],
)
@pytest.mark.parametrize("name", ["linear", "conv2d", "gpt2_tied", "mixtral", "experts", "bert"])
def test_the_masks_of_input_channels_keep_or_drop_whole_ones(name, changes):
    base = build(name)
    model = chosen_model(name, base, granularity="input_channel", task_type=None, seed=3, **changes).eval()
    twin = build(name)
    batches = [batch_of(name, seed) for seed in range(4)]
    draw = masks_by_channel(model, 0.4, seed=3)
    expected = reference.masked_training(twin, child_of(model), batches, OPTIMIZERS["sgd"], draw=draw)
    train(model, batches, OPTIMIZERS["sgd"])
    assert any("child_delta" in key and value.any() for key, value in model.state_dict().items())
    merged = model.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=2e-6)


def test_a_file_says_whether_its_masks_are_by_channel(tmp_path):
    """A run that began with masks of single entries goes on with them."""
    changes = {"variant": "random", "gradient_density": 0.4}
    model = chosen_model("llama", granularity="input_channel", **changes)
    for layer in child_tuning_layers(model).values():
        for mask in layer.child_mask["default"].values():
            mask.copy_(GradientMask.unpack(mask)._replace(by_channel=False).pack())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    masks = [GradientMask.unpack(value) for name, value in loaded.state_dict().items() if "child_mask" in name]
    assert masks
    assert not any(mask.by_channel for mask in masks)
    loaded(**batch_of("llama")).loss.backward()


def test_the_share_of_gradients_that_are_not_zero():
    model = model_of("llama", density=0.3)
    deltas = [parameter for name, parameter in model.named_parameters() if "child_delta" in name]
    numel = sum(delta.numel() for delta in deltas)
    optimizer = torch.optim.SGD(deltas, lr=0.01)
    for step in range(4):
        found = gradients(model, batch_of("llama", step))
        kept = sum(int((gradient != 0).sum()) for gradient in found.values())
        assert abs(kept - 0.3 * numel) <= 4 * (numel * 0.3 * 0.7) ** 0.5
        optimizer.step()


def test_the_mask_stays_until_the_optimizer_steps():
    model = model_of("linear")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    first = gradients(model, batch_of("linear"))
    assert_same(gradients(model, batch_of("linear")), first)  # another micro-batch of the same step
    optimizer.step()
    assert set(steps_of(model).values()) == {1}
    second = gradients(model, batch_of("linear"))
    assert all(not torch.equal(second[name], first[name]) for name in first)
    weights = [name for name in first if first[name].shape == (48,)]
    assert len(weights) == 1


def test_equal_shapes_have_different_masks():
    model = model_of("llama")
    named = {name: gradient != 0 for name, gradient in gradients(model, batch_of("llama")).items()}
    first, second = (
        kept for name, kept in named.items() if "0.self_attn.q_proj" in name or "1.self_attn.q_proj" in name
    )
    assert first.shape == second.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize("every", [1, 3])
def test_an_engine_without_a_torch_optimizer_counts_by_itself(every):
    model = model_of("linear", resample_every=every)
    seen = []
    for _ in range(6):
        seen.append(torch.cat(list(gradients(model, batch_of("linear")).values())))
        next_gradient_mask(model)
    redrawn = [step for step in range(1, 6) if not torch.equal(seen[step], seen[step - 1])]
    assert redrawn == ([1, 2, 3, 4, 5] if every == 1 else [3])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_does_not_change_the_mask(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    base = build("linear")
    other = copy.deepcopy(base)
    other.body = Checkpointed(other.body)
    batch = batch_of("linear")
    batch["x"].requires_grad_()
    targets = {"target_modules": ["0", "2"], "variant": "task_free", "density": 0.5}
    plain = gradients(get_peft_model(base, ChildTuningConfig(**targets)), batch)
    # Names differ with the wrapper, and masks with the names.
    model = get_peft_model(other, ChildTuningConfig(**targets))
    for layer in child_tuning_layers(model).values():
        names = layer.targets_of("default")
        names |= {key: name.replace("body.body", "body") for key, name in names.items()}
    assert_same({name.replace("body.body", "body"): value for name, value in gradients(model, batch).items()}, plain)


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: torch.load(_saved(model), weights_only=False)])
def test_copies_count_on_their_own(copying):
    model = model_of("linear")
    train(model, [batch_of("linear")] * 2)
    twin = copying(model)
    batches = [batch_of("linear", seed) for seed in range(3)]
    train(twin, batches)
    assert set(steps_of(model).values()) == {2}
    assert set(steps_of(twin).values()) == {5}
    train(model, batches)
    assert_same(snapshot(twin), snapshot(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


# The adapter: everything that holds for a fixed child network


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_saving_loading_and_merging_are_exact(tmp_path, name, dtype):
    model = get_peft_model(build(name, dtype=dtype), config_for(name, variant="task_free", init_weights=False))
    batch = batch_of(name, dtype=dtype)
    with model.disable_adapter():
        plain = logits(model, batch)
    before = snapshot(model)
    expected = logits(model, batch)
    assert not torch.equal(plain, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name, dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    model.merge_adapter()
    assert torch.equal(logits(model, batch), expected)
    model.unmerge_adapter()
    assert_same(snapshot(model), before)
    assert torch.equal(logits(loaded.merge_and_unload(), batch), expected)


def test_no_index_is_stored(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.numel() for name, tensor in tensors.items() if "child_index" in name} == {44}
    deltas = sum(tensor.numel() for name, tensor in tensors.items() if "child_delta" in name)
    assert deltas == sum(indices.numel() for indices in child_of(model).values())
    assert "every weight, through random gradient masks" in (tmp_path / "README.md").read_text()


def test_the_native_loader_of_transformers(tmp_path):
    model = model_of("llama")
    train(model, [batch_of("llama")] * 2)
    model.save_pretrained(tmp_path / "adapter")
    build("llama").save_pretrained(tmp_path / "base")
    native = build("llama")
    native.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(native, batch_of("llama")), logits(model, batch_of("llama")))
    assert steps_of(native) == steps_of(model)
    automatic = AutoPeftModelForCausalLM.from_pretrained(_with_base(tmp_path))
    assert torch.equal(logits(automatic, batch_of("llama")), logits(model, batch_of("llama")))


def _with_base(tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    return tmp_path / "adapter"


@pytest.mark.parametrize("changes", [{"variant": "task_free"}, {"gradient_density": 0.5}])
@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, changes, at):
    batches = [batch_of("bert", seed) for seed in range(6)]
    model = chosen_model("bert", **changes)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step, batch in enumerate(batches):
        if step == at:
            model.save_pretrained(tmp_path)
            states = copy.deepcopy(optimizer.state_dict())
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    resumed = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    optimizer.load_state_dict(states)
    assert set(steps_of(resumed).values()) == {at}
    for batch in batches[at:]:
        resumed(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(snapshot(resumed), snapshot(model))


def test_a_plain_state_dict_carries_the_step():
    model = model_of("linear")
    train(model, [batch_of("linear")] * 3)
    other = model_of("linear")
    other.load_state_dict(model.state_dict())
    assert set(steps_of(other).values()) == {3}
    other.load_state_dict(model.state_dict(), assign=True)
    assert set(steps_of(other).values()) == {3}


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"density": 0.5}, {"resample_every": 2}])
def test_resuming_with_other_masks_is_refused(tmp_path, changes, is_saved):
    model_of("linear").save_pretrained(tmp_path)
    other = model_of("linear", **changes)
    if is_saved:
        other.save_pretrained(tmp_path / "other")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"The gradient mask of 'body.0.weight' must be the one .* this config"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(snapshot(other), before)


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ({"gradient_density": 0.5}, {}, "this configuration says none"),
        ({}, {"seed": 1}, "random child network of .* another seed"),
        ({}, {"density": 0.3}, "random child network of .* another seed"),
    ],
)
def test_resuming_with_another_child_network_is_refused(tmp_path, saved, resumed, message, is_saved):
    settings = {"variant": "random", "density": 0.6}
    chosen_model("bert", **{**settings, **saved}).save_pretrained(tmp_path)
    other = chosen_model("bert", **{**settings, **resumed})
    if is_saved:
        other.save_pretrained(tmp_path / "other")
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(snapshot(other), before)


def test_a_file_without_masks_starts_at_the_first_one(tmp_path):
    model = model_of("linear")
    train(model, [batch_of("linear")])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "child_mask" not in name}, file)
    loaded = PeftModel.from_pretrained(build("linear"), tmp_path, is_trainable=True)
    assert set(steps_of(loaded).values()) == {0}


def test_evaluating_saving_and_disabling_change_nothing(tmp_path):
    batches = [batch_of("llama", seed) for seed in range(3)]
    plain, disturbed = model_of("llama"), model_of("llama")
    train(plain, batches)
    trainable = [parameter for parameter in disturbed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for batch in batches:
        disturbed(**batch).loss.backward()
        logits(disturbed, batch)
        disturbed.generate(input_ids=batch["input_ids"][:, :3], max_new_tokens=2)
        disturbed.save_pretrained(tmp_path)
        with disturbed.disable_adapter():
            logits(disturbed, batch)
        optimizer.step()
        optimizer.zero_grad()
        disturbed.eval()
    assert_same(snapshot(disturbed), snapshot(plain))


def test_selecting_is_refused():
    with pytest.raises(ValueError, match="is task_free"):
        select_child_network(model_of("linear"), [batch_of("linear")])


# From dense to sparse
