"""Puts Child-Tuning layers into a model and takes them out again, and checks what would go wrong."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_child.files.adapter_tensors import KINDS, MASK
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.layer import child_tuning_layers
from peft_child.tuner.targets import Target


_TOLD_TO_DDP = "_ddp_params_and_buffers_to_ignore"  # DDP reads it from the module that it wraps
_WRAPPERS = ("", "model.", "base_model.model.")  # what wraps the base model: nothing, the tuner, a PeftModel
_OURS = (".child_index.", ".child_mask.")


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Raise a `ValueError` if a model cannot have another adapter of this name."""
    is_ours = adapter_name in (*KINDS, MASK)  # by which our tensors are found in state dicts
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name) or is_ours:
        raise ValueError(
            f"adapter_name must be a name that a module can have: not empty, without dots, not that of a method, and "
            f"none of {', '.join((*KINDS, MASK))}; got '{adapter_name}'."
        )
    if child_tuning_layers(model, adapter_name):
        raise ValueError(
            f"The base model already has a Child-Tuning adapter named '{adapter_name}'; choose another adapter_name, "
            "or unload() the first model."
        )


def check_adapter_name(adapter_name: str, targets: list[Target]) -> None:
    """Raise a `ValueError` if an adapter has the name of a parameter, which PEFT would confuse in state dicts."""
    if any(adapter_name == owner.parameter for target in targets for owner in target.owners):
        raise ValueError(
            f"adapter_name must not be the name of a parameter of a targeted module, got '{adapter_name}'."
        )


def check_sizes(config: ChildTuningConfig, targets: list[Target]) -> None:
    """Raise a `ValueError` if the recorded sizes of a child network are not those of the targets."""
    numels = {target.name: target.parameter.numel() for target in targets}
    for name, size in (config.child_sizes or {}).items():
        if numels.get(name) != size.numel:
            here = f"{numels[name]} entries" if name in numels else "no such target"
            raise ValueError(
                f"The adapter does not fit the base model: its '{name}' has {size.numel} entries, the model has "
                f"{here}."
            )


def check_vocabulary(model: nn.Module, targets: list[Target]) -> None:
    """Raise a `ValueError` if a targeted embedding has rows that are in no checkpoint, since the vocabulary grew."""
    config: Any = getattr(model, "config", None)
    size, name = getattr(config, "vocab_size", None), getattr(config, "name_or_path", "")
    grown = [target.name for target in targets if target.parameter.dim() > 1 and len(target.parameter) == size]
    if not grown or not name:
        return
    try:
        before = type(config).from_pretrained(name, local_files_only=True).vocab_size
    except Exception:  # whatever a name that is no checkpoint's leads to
        return
    if before != size:
        raise ValueError(
            f"'{grown[0]}' has {size} rows, but '{name}' has {before}: the adapter's file would not have the new ones."
            f" Save the resized model and load it from there, or train '{grown[0].rpartition('.')[0]}' whole "
            "(modules_to_save)."
        )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of the model where `old` stands, but not inside `new` itself."""
    for module in list(model.modules()):
        if module is not new:
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the layers of a model, and out the layers that have no other one."""
    for layer in child_tuning_layers(model, adapter_name).values():
        layer.delete_adapter(adapter_name)
        if not layer.adapters:
            replace_module(model, layer, layer.base_layer)


def keep_buffers_from_ddp(model: nn.Module) -> None:
    """Let DDP leave out our buffers, which it would broadcast at every forward; all ranks have the same ones.

    Names of others that are marked on the model already stay. Where a `PeftModel` or the tuner is wrapped, its
    attribute lookup finds the names here, on the base model.

    Args:
        model: The base model. To be called whenever its adapters have changed.
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
