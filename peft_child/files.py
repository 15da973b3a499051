"""Fits the tensors of a loaded adapter file to the layers of a model.

Everything is checked before anything changes: a file that is damaged, or belongs to another base model, leaves the
model as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_child.codec import FormatError, decode, read_header
from peft_child.config import ChildTuningConfig
from peft_child.layer import ChildTuningLayer, child_tuning_layers


def fit_state_dict(
    model: nn.Module, config: ChildTuningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Check a file's tensors against the model, make room for them, and name them as the model does.

    Args:
        model: A model whose layers have the adapter.
        config: The adapter's configuration; the sizes of its child network are recorded in it.
        adapter_name: The adapter.
        state_dict: The file's tensors, and those of other parts of the adapter, which pass through.

    Returns:
        The tensors by their names in the model's state dict.

    Raises:
        FormatError: If a tensor is damaged, or does not fit the base model. Nothing has changed then.
    """
    files = {_canonical(key): key for key in state_dict}
    remapped: dict[str, Tensor] = {}
    sizes: dict[str, list[int]] = {}
    rooms: list[tuple[ChildTuningLayer, dict[str, tuple[int, int]]]] = []
    for path, layer in child_tuning_layers(model).items():
        room: dict[str, tuple[int, int]] = {}
        for parameter, name in layer.child_targets.get(adapter_name, {}).items():
            keys = [files.pop(_file_key(name, kind), None) for kind in _KINDS]
            if keys == [None, None]:
                continue  # nothing was chosen there
            delta, block = (state_dict[key] if key else None for key in keys)
            numel = layer.base_parameter(parameter).numel()
            count, num_bytes = _check_child(name, numel, delta, block)
            room[parameter] = (count, num_bytes)
            sizes[name] = [numel, count, num_bytes]
            for kind, key in zip(_KINDS, keys, strict=True):
                remapped[f"{path}.{kind}.{adapter_name}.{parameter}"] = state_dict[str(key)]
        if adapter_name in layer.child_targets:
            rooms.append((layer, room))
    for key in files.values():
        if any(f".{kind}." in key for kind in _KINDS):
            raise FormatError(f"'{key}' belongs to no parameter that this adapter targets in this base model.")
        remapped[key] = state_dict[key]

    for layer, room in rooms:
        is_active = adapter_name in layer.active_adapters and not layer.disable_adapters
        layer.allocate(adapter_name, room, trainable=is_active and not config.inference_mode)
    config.child_sizes = sizes
    return remapped


_KINDS = ("child_delta", "child_index")


def _canonical(key: str) -> str:
    """A key as it would be in a base model without other adapter layers, whose names stand in between."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _file_key(name: str, kind: str) -> str:
    """The canonical key of one tensor of the child of parameter `name`."""
    path, _, parameter = name.rpartition(".")
    return f"{path}.{kind}.{parameter}"


def _check_child(name: str, numel: int, delta: Tensor | None, block: Tensor | None) -> tuple[int, int]:
    """Number of chosen entries and of bytes of the block, of a child that fits a tensor of `numel` entries."""
    if delta is None or block is None:
        missing = _KINDS[0] if delta is None else _KINDS[1]
        raise FormatError(f"The file has one tensor of the child of '{name}' without the other: {missing} is missing.")
    if block.dtype != torch.uint8 or block.dim() != 1 or delta.dim() != 1 or not delta.is_floating_point():
        raise FormatError(
            f"The child of '{name}' must be a 1-D uint8 index block and a 1-D floating point delta, got "
            f"{block.dtype} {tuple(block.shape)} and {delta.dtype} {tuple(delta.shape)}."
        )
    try:
        data = block.cpu().numpy().data
        header = read_header(data)
        if header.numel != numel:
            raise FormatError(f"It belongs to a tensor of {header.numel} entries, the base model's has {numel}.")
        if header.size != delta.numel():
            raise FormatError(f"Its index has {header.size} positions and its delta {delta.numel()} values.")
        decode(data)
    except FormatError as error:
        raise FormatError(f"The child of '{name}' cannot be loaded. {error}") from error
    return delta.numel(), block.numel()
