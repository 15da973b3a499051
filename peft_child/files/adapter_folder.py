"""An adapter folder, without any model: settings, sparse deltas, and modules saved whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_child.card.model_card import complete_card
from peft_child.files.adapter_tensors import DELTA, INDEX, PREFIX, checked_child, child_keys, claimed_size, stamped
from peft_child.files.checkpoint import replacing
from peft_child.files.safetensors_io import TensorWriter
from peft_child.tensors.codec import FormatError, encode
from peft_child.tensors.delta import ChildSize, Progress, SparseDelta, silent
from peft_child.tensors.lazy import Lazy


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "PEFT_CHILD"

WITHOUT_MASK: dict[str, Any] = {"gradient_density": 1.0, "resample_every": 1}

# Clears the settings of a selection, for adapters that were made from other adapters.
WITHOUT_SELECTION: dict[str, Any] = {
    "variant": "extracted",
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    **WITHOUT_MASK,
    "fisher_examples": None,
    "child_sizes": None,
}


@dataclass
class SparseAdapter:
    """A Child-Tuning adapter as tensors.

    Attributes:
        settings: What `adapter_config.json` holds.
        deltas: Sparse deltas by name of the parameter in the base model. The file stores only the number of rows, so
            deltas read from a folder have the shape of a matrix.
        dense: Tensors saved whole (`modules_to_save`), by name in the file.
        sizes: Entries, chosen entries, and bytes of the index block, by name of the parameter.
    """

    settings: dict[str, Any]
    deltas: Mapping[str, SparseDelta]
    dense: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, ChildSize] = field(default_factory=dict)


def classes_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The classes that an adapter tells apart, as the configuration of a model has them; empty if there are none."""
    labels = settings.get("labels") or []
    numbers = {label: number for number, label in enumerate(labels)}
    return {"id2label": dict(enumerate(labels)), "label2id": numbers} if labels else {}


def open_adapter(folder: str | Path) -> SparseAdapter:
    """Open an adapter folder; every delta is read and checked on access.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: If one of the files is missing.
        FormatError: If the adapter is of another PEFT method, or a file is not valid. Access to a damaged delta
            raises it too.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
            way_out = f"pass --subfolder {inside[0]}, or name '{folder / inside[0]}'" if inside else ""
            hint = f" There are adapters in it: {way_out}." if inside else ""
            raise FileNotFoundError(f"'{folder}' is not an adapter folder: it has no '{name}'.{hint}")
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text())
        method = settings.get("peft_type") if isinstance(settings, dict) else None
        if method != PEFT_TYPE:
            raise FormatError(f"'{folder}' is an adapter of type {method!r}, not of Child-Tuning ({PEFT_TYPE!r}).")
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            keys, others = child_keys(file.keys())
            dense = {key: file.get_tensor(key) for key in others}
            # Slices, so that only the headers of blocks are read now.
            blocks = {name: file.get_slice(pair[INDEX]) for name, pair in keys.items() if INDEX in pair}
            found = {name: claimed_size(name, block) for name, block in blocks.items()}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"The adapter in '{folder}' cannot be read: {error}.") from error
    # The record is for loaders that need shapes before they open the file, so it may be missing.
    recorded = settings.get("child_sizes")
    try:
        sizes = found if recorded is None else {name: ChildSize(*size) for name, size in recorded.items()}
    except (AttributeError, TypeError):  # a malformed record names no parameters, and is refused below
        sizes = {}
    if sizes.keys() != keys.keys():
        raise FormatError(
            f"child_sizes in '{CONFIG_NAME}' must name the parameters that have a child network in '{WEIGHTS_NAME}'."
        )
    deltas = Lazy(keys, lambda name: _read_delta(folder / WEIGHTS_NAME, name, keys[name], sizes[name]))
    return SparseAdapter(settings, deltas, dense, sizes)


def read_adapter(folder: str | Path) -> SparseAdapter:
    """Open an adapter folder and check all of it, one tensor at a time.

    Raises:
        FileNotFoundError: If one of the files is missing.
        FormatError: If it is an adapter of another PEFT method, or a file is damaged.
    """
    adapter = open_adapter(folder)
    for name in adapter.deltas:
        adapter.deltas[name]  # access checks it
    return adapter


def _read_delta(file: Path, name: str, keys: Mapping[str, str], size: ChildSize) -> SparseDelta:
    """Read and check one delta; `keys` maps each kind of tensor to its name in the file."""
    with safe_open(file, framework="pt") as tensors:
        child = checked_child(name, {kind: tensors.get_tensor(key) for kind, key in keys.items()})
    if size != child.size():
        raise FormatError(
            f"The child of '{name}' cannot be loaded. Its entries, chosen entries and index bytes are {list(size)} in "
            f"the settings and {list(child.size())} in the file."
        )
    return child.sparse_delta(name)


def write_adapter(
    folder: str | Path, adapter: SparseAdapter, force: bool = False, progress: Progress = silent
) -> None:
    """Write an adapter folder that every loader can read, with a model card; an error leaves no partial folder.

    Deltas are read one at a time, each once.

    Args:
        folder: The folder to make.
        adapter: The adapter; the sizes of its child networks are added to the settings that are written.
        force: Replace a folder that exists.
        progress: Wraps the loop over tensor names.

    Raises:
        FileExistsError: If the folder exists and `force` is not set.
    """
    with replacing(folder, force) as temporary:
        temporary.mkdir()
        with TensorWriter(temporary / WEIGHTS_NAME) as weights:
            for key, tensor in adapter.dense.items():
                weights.add(key, tensor)
            sizes = {}
            for name in progress(list(adapter.deltas), "Writing"):
                delta = adapter.deltas[name]
                if delta.indices.numel():  # the format has no empty child networks
                    sizes[name] = _write_delta(weights, name, delta)
        settings = {**adapter.settings, "child_sizes": sizes}
        (temporary / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True))
        if sizes:  # what is added to the card describes a child network
            complete_card(temporary, settings)


def _write_delta(weights: TensorWriter, name: str, delta: SparseDelta) -> ChildSize:
    path, _, parameter = name.rpartition(".")
    block = encode(delta.indices.cpu().numpy(), delta.shape, delta.fingerprint, delta.layout)
    pair = {
        f"{PREFIX}{path}.{DELTA}.{parameter}": delta.values,
        # A bytearray, since torch warns of memory that it cannot write to.
        f"{PREFIX}{path}.{INDEX}.{parameter}": torch.frombuffer(bytearray(block), dtype=torch.uint8),
    }
    for key, tensor in stamped(pair).items():
        weights.add(key, tensor)
    return ChildSize(delta.numel, delta.indices.numel(), len(block))
