"""Optimizers, precisions and the tricks of training loops: what they do to a child network, and to nothing else."""

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call
from transformers.optimization import Adafactor

from peft_child import mask_gradients, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.gradient_mask import GradientMask

from .. import reference
from ..helpers import assert_same, checkpoint_activations, child_of, chosen_model, config_for, logits, snapshot, train
from ..problems import batch_of, build


VARIANTS = ["task_driven", "random", "task_free"]


DENSITY = 0.3  # what `config_for` asks for


class WritesData(torch.optim.Optimizer):
    """Gradient descent behind the back of autograd, as many optimizers outside of torch do it."""

    def __init__(self, params, lr=0.1, rebind=False):
        super().__init__(params, {"lr": lr})
        self.rebind = rebind

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                change = -group["lr"] * parameter.grad.data
                if self.rebind:
                    parameter.data = parameter.data + change
                else:
                    parameter.data.add_(change)


class ClippedSGD(torch.optim.SGD):
    """Clips, as a training loop would do just before the step."""

    def step(self, closure=None):
        (group,) = self.param_groups
        norm = torch.nn.utils.clip_grad_norm_(group["params"], 0.02)
        assert norm > 0.02
        return super().step(closure)


WITHOUT_DECAY = {  # test_conformance.py has torch's SGD and AdamW without decay
    "data_written": WritesData,
    "data_rebound": partial(WritesData, rebind=True),
    "clipped": partial(ClippedSGD, lr=0.5),
}


ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


WITH_OWN_DEFINITION = {
    "sgd_decay": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw_decay": partial(ADAMW, foreach=False),
    "adamw_decay_foreach": partial(ADAMW, foreach=True),
    "adamw_decay_fused": partial(ADAMW, fused=True),
    "adafactor": Adafactor,  # its own step size, and a scale from the values of the parameter
    "adafactor_fixed": partial(Adafactor, lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1),
}


class PlainDelta:
    """A base model plus k numbers for each tensor, without modules, hooks or PEFT.

    This is the definition where an optimizer looks at the values of its parameters: decay pulls a delta to 0, that is
    the weight to its base value, while in masked full fine-tuning it would pull the weight itself to 0.
    """

    def __init__(self, base, child, variant):
        self.base = copy.deepcopy(base)
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)
        self.child = child
        self.deltas = {name: torch.zeros(len(index), requires_grad=True) for name, index in child.items()}
        if variant == "task_free":  # hooks that test_task_free.py compares with the literal method
            self.masks = mask_gradients(self.deltas.items(), density=DENSITY)

    def weights(self):
        own = dict(self.base.named_parameters(remove_duplicate=False))
        return {
            name: (own[name].float().flatten().index_add(0, index, self.deltas[name]).view(own[name].shape)).to(
                own[name].dtype
            )
            for name, index in self.child.items()
        }

    def __call__(self, **batch):
        return functional_call(self.base, self.weights(), (), batch)

    def parameters(self):
        return list(self.deltas.values())


def literal_mask(step, name, numel):
    return GradientMask(DENSITY, step=step).draw(name, numel) / DENSITY


def deltas_of(model):
    return {
        name: delta.values.detach().clone()
        for layer in child_tuning_layers(model).values()
        for name, delta in layer.sparse_deltas("default").items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", WITHOUT_DECAY)
@pytest.mark.parametrize("name", ["linear", "gpt2_tied", "bert"])
def test_training_equals_full_fine_tuning_with_a_masked_gradient(name, optimizer, variant):
    base = build(name)
    twin, before = copy.deepcopy(base), snapshot(base)
    model = chosen_model(name, base, task_type=None, variant=variant).eval()
    batches = [batch_of(name, seed) for seed in range(5)]
    draw = literal_mask if variant == "task_free" else None
    expected = reference.masked_training(twin, child_of(model), batches, WITHOUT_DECAY[optimizer], draw=draw)
    train(model, batches, WITHOUT_DECAY[optimizer])
    assert any(delta.any() for delta in deltas_of(model).values())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        # Weights of about 1 accumulate one rounding of 6e-8 at each step, deltas do not.
        torch.testing.assert_close(merged[key], value, rtol=0, atol=5e-7)
    assert_same(snapshot(model.unload()), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", WITH_OWN_DEFINITION)
@pytest.mark.parametrize("name", ["linear", "gpt2_tied", "bert"])
def test_training_equals_that_of_plain_deltas(name, optimizer, variant):
    base = build(name)
    before = snapshot(base)
    model = chosen_model(name, base, task_type=None, variant=variant).eval()
    plain = PlainDelta(build(name), child_of(model), variant)
    batches = [batch_of(name, seed) for seed in range(5)]
    train(model, batches, WITH_OWN_DEFINITION[optimizer])
    train(plain, batches, WITH_OWN_DEFINITION[optimizer])
    assert any(delta.any() for delta in plain.deltas.values())
    trained, expected = deltas_of(model), {name: delta.detach() for name, delta in plain.deltas.items()}
    if name == "gpt2_tied" and variant == "task_free":  # each use of a tied weight scales its part of the gradient
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)
    else:
        assert_same(trained, expected)
    assert_same(snapshot(model.unload()), before)


def test_decay_pulls_the_delta_and_not_the_weight_to_zero():
    model = chosen_model("linear")
    batch = batch_of("linear")
    train(model, [batch] * 3)
    trained = deltas_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_same(deltas_of(model), {name: delta * (1 - 0.1 * 0.5) for name, delta in trained.items()})


def test_clipping_sees_the_norm_of_the_child():
    base = build("bert")
    model = chosen_model("bert", base, task_type=None)
    child = child_of(model)
    twin = build("bert")
    batch = batch_of("bert")
    twin(**batch).loss.backward()
    dense = dict(twin.named_parameters())
    expected = torch.cat([dense[name].grad.flatten()[index] for name, index in child.items()]).norm()
    model.eval()(**batch).loss.backward()
    unclipped = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected)
    assert norm < torch.cat([parameter.grad.flatten() for parameter in dense.values()]).norm()
    for key, value in model.named_parameters():
        if key in unclipped:
            torch.testing.assert_close(value.grad, unclipped[key] * 1e-3 / (norm + 1e-6))  # torch's formula


# Precision


class Scaled:
    """A step of mixed precision with a gradient scaler, the loss of one step being infinite."""

    def __init__(self, parameters, optimizer, overflow=2):
        self.optimizer = optimizer(parameters)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.overflow = overflow
        self.scales = []

    def train(self, model, batches):
        for step, batch in enumerate(batches):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**batch).loss
            self.scaler.scale(loss * float("inf") if step == self.overflow else loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scales.append(self.scaler.get_scale())
            yield step


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["linear", "bert"])
def test_fp16_autocast_with_a_gradient_scaler_and_a_skipped_step(name, fused, variant):
    optimizer = partial(ADAMW, fused=fused)
    base = build(name)
    before = snapshot(base)
    model = chosen_model(name, base, task_type=None, variant=variant).eval()
    plain = PlainDelta(build(name), child_of(model), variant)
    batches = [batch_of(name, seed) for seed in range(5)]
    ours = Scaled([p for p in model.parameters() if p.requires_grad], optimizer)
    twin = Scaled(plain.parameters(), optimizer)
    deltas = []
    for _ in zip(ours.train(model, batches), twin.train(plain, batches), strict=True):
        assert_same(deltas_of(model), {key: delta.detach() for key, delta in plain.deltas.items()})
        deltas.append(deltas_of(model))
    assert ours.scales == twin.scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert_same(deltas[2], deltas[1])
    assert all(any(not torch.equal(a[key], b[key]) for key in a) for a, b in ((deltas[1], deltas[0]), deltas[3:]))
    assert_same(snapshot(model.unload()), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["linear", "llama", "bert"])
def test_bf16_autocast(name, variant):
    base = build(name)
    before = snapshot(base)
    model = chosen_model(name, base, task_type=None, variant=variant).eval()
    plain = PlainDelta(build(name), child_of(model), variant)
    batches = [batch_of(name, seed) for seed in range(4)]
    for each in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(each, batches, ADAMW)
    assert any(delta.any() for delta in plain.deltas.values())
    assert_same(deltas_of(model), {key: delta.detach() for key, delta in plain.deltas.items()})
    assert_same(snapshot(model.unload()), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_small_steps_on_a_bf16_base_add_up(variant):
    """In bfloat16 the next number to a weight of 0.1 is 5e-4 away: a step of 1e-5 alone leaves the weight there."""
    base = build("linear", dtype=torch.bfloat16)
    twin, before = copy.deepcopy(base), snapshot(base)
    model = get_peft_model(base, config_for("linear", variant=variant, density=0.5))
    batch = batch_of("linear", dtype=torch.bfloat16)
    if variant == "task_driven":
        select_child_network(model, [batch], progress_bar=False)
    large = {name: index[before[name].flatten()[index].abs() > 0.1] for name, index in child_of(model).items()}

    def in_base(state):
        return {name: state[name].flatten()[index] for name, index in large.items()}

    steps = []

    def optimizer(parameters):
        result = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
        result.register_step_post_hook(lambda *_: steps.append((deltas_of(model), merged_weights(model))))
        return result

    train(model, [batch] * 1000, optimizer)
    deltas, composed = steps[0]
    assert all(delta.any() for delta in deltas.values())
    assert {delta.dtype for delta in deltas.values()} == {torch.float32}
    assert_same(in_base(composed), in_base(before))
    moved = in_base(steps[-1][1])
    assert all(not torch.equal(moved[name], value) for name, value in in_base(before).items())
    assert_same(snapshot(model.unload()), before)

    plain = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
    dense = reference.masked_training(twin, large, [batch] * 1000, plain)
    assert_same(in_base(dense.state_dict()), in_base(before))  # what the fp32 deltas are for


def merged_weights(model):
    """The targeted weights as the model computes with them."""
    found = {}
    for layer in child_tuning_layers(model).values():
        for key, name in layer.targets_of("default").items():
            found[name] = getattr(layer, key).detach().clone()
    return found


# Loops


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["linear", "llama", "bert"])
def test_accumulated_gradients_are_those_of_the_big_batch(name, variant):
    model = chosen_model(name, variant=variant).eval()
    batch = batch_of(name)
    model(**batch).loss.backward()
    expected = gradients_of(model)
    for row in range(4):
        (model(**{key: value[row : row + 1] for key, value in batch.items()}).loss / 4).backward()
    for key, value in gradients_of(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


def gradients_of(model):
    found = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    assert any("child_delta" in key and gradient.any() for key, gradient in found.items())
    return found


def trajectory(model, batches, between=lambda model, step: None):
    """Losses and final state of a training with dropout; `between` runs before each step with the next batch."""
    torch.manual_seed(11)
    losses = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ADAMW(trainable)
    for step, batch in enumerate(batches):
        between(model, step)
        loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {**snapshot(model), "losses": torch.stack(losses)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_activation_checkpointing_changes_no_bit(name, reentrant, variant):
    batches = [batch_of(name, seed) for seed in range(3)]
    expected = trajectory(chosen_model(name, variant=variant), batches)
    model = chosen_model(name, variant=variant)
    checkpoint_activations(model.base_model.model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    assert_same(trajectory(model, batches), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["linear", "attention", "llama", "bert"])
def test_activation_offload_changes_no_bit(name, variant):
    batches = [batch_of(name, seed) for seed in range(3)]
    expected = trajectory(chosen_model(name, variant=variant), batches)
    with torch.autograd.graph.save_on_cpu():
        assert_same(trajectory(chosen_model(name, variant=variant), batches), expected)


def evaluate(model, step, folder):
    logits(model, batch_of("llama", 30 + step))


def generate(model, step, folder):
    model.eval().generate(
        input_ids=batch_of("llama", 30 + step)["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0
    )


def disable(model, step, folder):
    with model.disable_adapter():
        logits(model, batch_of("llama", 30 + step))


def merge(model, step, folder):
    model.merge_adapter()
    logits(model, batch_of("llama", 30 + step))
    model.unmerge_adapter()


def save(model, step, folder):
    model.save_pretrained(folder / str(step))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("between", [evaluate, generate, disable, merge, save], ids=lambda call: call.__name__)
def test_what_happens_between_two_steps_changes_no_bit(between, variant, tmp_path):
    def undisturbed(model, step):
        with torch.random.fork_rng():  # `batch_of` seeds
            between(model, step, tmp_path)

    batches = [batch_of("llama", seed) for seed in range(4)]
    expected = trajectory(chosen_model("llama", variant=variant, task_type="CAUSAL_LM"), batches)
    model = chosen_model("llama", variant=variant, task_type="CAUSAL_LM")
    assert_same(trajectory(model, batches, undisturbed), expected)


# Optimizers that came too early
