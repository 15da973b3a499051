"""Puts Child-Tuning layers into a model and takes them out again, and checks what would go wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_child.files.adapter_tensors import KINDS, MASK
from peft_child.layers.layer import ChildTuningLayer, child_tuning_layers
from peft_child.tensors.delta import ChildSize
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.targets import Target, saved_whole


_TOLD_TO_DDP = "_ddp_params_and_buffers_to_ignore"  # an attribute that DDP reads from the module that it wraps
_WRAPPERS = ("", "model.", "base_model.model.")  # name prefixes if DDP wraps the base model, the tuner or a PeftModel
_OURS = (".child_index.", ".child_mask.")


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Raise a `ValueError` if a model cannot have another adapter of this name."""
    is_ours = adapter_name in (*KINDS, MASK)  # names by which our tensors are found in state dicts
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name) or is_ours:
        raise ValueError(
            f"adapter_name must be a name that a module can have: not empty, without dots, not the name of a method "
            f"of nn.ModuleDict, and none of {', '.join((*KINDS, MASK))}; got '{adapter_name}'."
        )
    if child_tuning_layers(model, adapter_name):
        raise ValueError(
            f"The base model already has a Child-Tuning adapter named '{adapter_name}'; choose another adapter_name, "
            "or unload() the first model."
        )


def check_sizes(sizes: Mapping[str, ChildSize], numels: Mapping[str, int]) -> None:
    """Raise a `ValueError` if child networks of these sizes do not fit the targets with these numbers of entries."""
    for name, size in sizes.items():
        if numels.get(name) != size.numel:
            here = f"{numels[name]} entries" if name in numels else "no such target"
            raise ValueError(
                f"The adapter does not fit the base model: its '{name}' has {size.numel} entries, the base model has "
                f"{here}."
            )


def check_vocabulary(model: nn.Module, targets: list[Target]) -> None:
    """Raise a `ValueError` if the vocabulary was resized: new rows of a targeted embedding would be in no file."""
    config: Any = getattr(model, "config", None)
    size, name = getattr(config, "vocab_size", None), getattr(config, "name_or_path", "")
    grown = [target.name for target in targets if target.parameter.dim() > 1 and len(target.parameter) == size]
    if not grown or not name:
        return
    try:
        before = type(config).from_pretrained(name, local_files_only=True).vocab_size
    except Exception:  # `name_or_path` need not be a checkpoint, and then anything can fail
        return
    if before != size:
        raise ValueError(
            f"'{grown[0]}' has {size} rows, but '{name}' has {before}: the adapter's file would not have the new ones."
            f" Save the resized model and load it from there, or train '{grown[0].rpartition('.')[0]}' whole "
            "(modules_to_save)."
        )


def warn_of_half_precision(model: nn.Module, config: ChildTuningConfig) -> None:
    """Warn if a module that is trained whole is in float16, where the epsilon of AdamW is zero."""
    whole = [f".{name}." for name in saved_whole(config)]
    half = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.float16 and any(ending in f".{name}" for ending in whole)
    ]
    if half:
        warnings.warn(
            f"'{half[0]}' is trained whole, and in float16, where AdamW makes it NaN: load the base model with "
            "dtype=torch.float32 or torch.bfloat16.",
            stacklevel=2,
        )


Parents = dict[nn.Module, list[tuple[nn.Module, str]]]


def parents_of(model: nn.Module) -> Parents:
    """For every module, each of its parent modules and its name in that parent."""
    parents: Parents = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                parents.setdefault(child, []).append((module, name))
    return parents


def replace_everywhere(parents: Parents, old: nn.Module, new: nn.Module) -> None:
    """Put a module in every place where another one stood when `parents_of` was called."""
    for parent, name in parents[old]:
        parent._modules[name] = new


def unwrap(model: nn.Module, layers: Iterable[ChildTuningLayer]) -> None:
    """Put the base layers back in every place of the model where these layers stand."""
    parents = parents_of(model)
    for layer in layers:
        replace_everywhere(parents, layer, layer.base_layer)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter from the layers of a model, and unwrap the layers that have no other."""
    layers = child_tuning_layers(model, adapter_name).values()
    for layer in layers:
        layer.delete_adapter(adapter_name)
    unwrap(model, (layer for layer in layers if not layer.adapters))


def keep_buffers_from_ddp(model: nn.Module) -> None:
    """Tell DDP not to broadcast our buffers at every forward, since they are equal on all ranks.

    This has to be called again whenever adapters change. Names that other code has listed there stay. DDP finds the
    list also if it wraps a `PeftModel` or the tuner, since both look up missing attributes in the base model.

    Args:
        model: The base model.
    """
    before = list(getattr(model, _TOLD_TO_DDP, ()))
    names = [
        f"{wrapper}{path}{ours}{adapter}.{parameter}"
        for wrapper in _WRAPPERS
        for ours in _OURS
        for path, layer in child_tuning_layers(model).items()
        for adapter in layer.adapters
        for parameter in layer.targets_of(adapter)
    ]
    after = [name for name in before if not any(ours in name for ours in _OURS)] + names
    if after != before:
        setattr(model, _TOLD_TO_DDP, after)
