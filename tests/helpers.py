"""What many tests do with a model."""

from __future__ import annotations

import threading

import torch
from peft import get_peft_model

from peft_child import ChildTuningConfig, select_child_network
from peft_child.layers.layer import child_tuning_layers

from .problems import PROBLEMS, batch_of, build


DEFAULTS = {"density": 0.3, "granularity": "entry"}  # see `granularity` in conftest.py


def config_for(name, **changes):
    return ChildTuningConfig(**{**DEFAULTS, **PROBLEMS[name].targets, **changes})


def settings_of(variant):
    """Settings of a variant, of which 'channels' is the task-driven one with whole input channels."""
    channels = {"variant": "task_driven", "granularity": "input_channel"}
    return channels if variant == "channels" else {"variant": variant}


def chosen_model(name, base=None, **changes):
    """A PeftModel of a problem with its child network chosen, at the base weights."""
    model = get_peft_model(build(name) if base is None else base, config_for(name, **changes))
    if model.peft_config["default"].variant == "task_driven":
        select_child_network(model, [batch_of(name)], progress_bar=False)
    return model


def checkpoint_activations(base, reentrant=False):
    """What transformers 5.13 still calls gradient checkpointing."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def child_of(model, adapter_name="default"):
    """Flat indices of an adapter's child network by parameter name."""
    found = {}
    for layer in child_tuning_layers(model).values():
        for parameter, name in layer.targets_of(adapter_name).items():
            if name in layer.named_deltas(adapter_name):
                found[name] = layer.indices(adapter_name, parameter)
    return found


def train(model, batches, make_optimizer=None, accumulation=1):
    """A plain training loop over the trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable) if make_optimizer else torch.optim.AdamW(trainable, lr=1e-2)
    for step, batch in enumerate(batches, start=1):
        (model(**batch).loss / accumulation).backward()
        if step % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()


def move(model, scale=0.05, adapter_name="default"):
    """Random deltas, as if trained."""
    with torch.no_grad():
        for layer in child_tuning_layers(model).values():
            for delta in layer.named_deltas(adapter_name).values():
                delta.copy_(torch.randn(delta.shape) * scale)


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def in_threads(work, count):
    """Run `work(0)`, `work(1)`, ... at the same time, each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(which,)) for which in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    """Bit-equal mappings of tensors."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
