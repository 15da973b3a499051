"""An adapter on disk without any model: its settings, its sparse deltas, and the modules saved whole with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_child.checkpoint import replacing
from peft_child.codec import FormatError, encode
from peft_child.delta import SparseDelta
from peft_child.sparse_file import DELTA, INDEX, PREFIX, StoredChild, read_children, stamped


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "PEFT_CHILD"


@dataclass
class SparseAdapter:
    """A Child-Tuning adapter as tensors.

    Attributes:
        settings: What `adapter_config.json` holds.
        deltas: Sparse deltas by name of the parameter in the base model; their shape is that of a matrix with the
            tensor's rows, since the file knows no more.
        fingerprints: Of the base values at the chosen positions, by name; 0 if unknown.
        dense: Tensors saved whole (`modules_to_save`), by name in the file.
        num_bytes: Bytes of each index block, by name.
    """

    settings: dict[str, Any]
    deltas: dict[str, SparseDelta]
    fingerprints: dict[str, int] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> SparseAdapter:
    """Read and check an adapter folder.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: If one of the files is missing.
        FormatError: If it is an adapter of another PEFT method, or a file is damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' is no folder of an adapter: it has no '{name}'.")
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"The adapter in '{folder}' cannot be read: {error}.") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != PEFT_TYPE:
        raise FormatError(f"'{folder}' is an adapter of type {kind!r}, not of Child-Tuning ({PEFT_TYPE!r}).")

    children, dense = read_children(tensors)
    _check_recorded(settings.get("child_sizes"), children)
    adapter = SparseAdapter(settings, {}, dense=dense)
    for name, child in sorted(children.items()):
        shape = (child.header.numel // child.header.width, child.header.width)
        try:
            adapter.deltas[name] = SparseDelta(shape, child.indices(), child.delta)
        except FormatError as error:
            raise FormatError(f"The child of '{name}' cannot be loaded. {error}") from error
        adapter.fingerprints[name] = child.header.fingerprint
        adapter.num_bytes[name] = child.block.numel()
    return adapter


def _check_recorded(sizes: Any, children: Mapping[str, StoredChild]) -> None:
    """Compare the file with what the settings say of it, before anything of a claimed size is reserved."""
    if sizes is None:
        return
    if not isinstance(sizes, dict) or sizes.keys() != children.keys():
        raise FormatError(f"child_sizes of '{CONFIG_NAME}' names other parameters than '{WEIGHTS_NAME}' has.")
    for name, child in children.items():
        found = [child.header.numel, child.header.size, child.block.numel()]
        if sizes[name] != found:
            raise FormatError(
                f"The child of '{name}' cannot be loaded. The settings say {sizes[name]} entries, chosen entries and "
                f"bytes of it, the file {found}."
            )


def write_adapter(folder: str | Path, adapter: SparseAdapter, force: bool = False) -> None:
    """Write an adapter folder that every loader can read, whole or not at all.

    Args:
        folder: The folder to make.
        adapter: The adapter; the sizes of its child networks are recorded in the settings that are written.
        force: Replace a folder that exists.

    Raises:
        FileExistsError: If the folder exists and `force` is not set.
    """
    tensors = {key: tensor.contiguous() for key, tensor in adapter.dense.items()}
    sizes: dict[str, list[int]] = {}
    for name, delta in adapter.deltas.items():
        if not delta.indices.numel():
            continue
        path, _, parameter = name.rpartition(".")
        block = encode(delta.indices.cpu().numpy(), delta.shape, adapter.fingerprints.get(name, 0))
        tensors[f"{PREFIX}{path}.{DELTA}.{parameter}"] = delta.values.contiguous()
        tensors[f"{PREFIX}{path}.{INDEX}.{parameter}"] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        sizes[name] = [delta.numel, delta.indices.numel(), len(block)]
    settings = {**adapter.settings, "child_sizes": sizes}
    with replacing(folder, force) as temporary:
        temporary.mkdir()
        save_file(stamped(tensors), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True))
