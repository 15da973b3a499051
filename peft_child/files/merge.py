"""An adapter in a checkpoint: written into it, written beside it as a patch, or compared with it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from peft_child.files.adapter_folder import SparseAdapter
from peft_child.files.adapter_tensors import PREFIX, fingerprint_of, fingerprint_of_values, fingerprints_differ
from peft_child.files.checkpoint import Checkpoint, copy_with_changes, replacing
from peft_child.files.safetensors_io import TensorWriter
from peft_child.tensors.delta import Progress, SparseDelta, rounded_sum, silent
from peft_child.tensors.lazy import read_ahead


class NamesDifferError(ValueError):
    """An adapter's parameters have other names in a checkpoint, which transformers renames on loading."""


def merge_checkpoint(
    adapter: SparseAdapter, base: Checkpoint, folder: str | Path, force: bool = False, progress: Progress = silent
) -> None:
    """Write a checkpoint with the adapter merged, in the files of the base and with everything beside them.

    The values are those of `merge_and_unload()`, bit for bit. Memory is a few times the largest tensor.

    Args:
        adapter: The adapter.
        base: The checkpoint of its base model.
        folder: The folder to make.
        force: Replace a folder that exists.
        progress: Wraps the loop over tensor names.

    Raises:
        NamesDifferError: If the checkpoint has other names than the model, or lacks a module that was saved whole.
        ValueError: If a tensor has another size.
        FileExistsError: If the folder exists and `force` is not set.
    """
    check_fits(adapter, base)
    names = base.in_file_order([*adapter.deltas, *(key.removeprefix(PREFIX) for key in adapter.dense)])
    deltas = read_ahead(adapter.deltas, [name for name in names if name in adapter.deltas])
    strange: list[str] = []

    def merged(name: str, tensor: Tensor) -> Tensor:
        if name not in adapter.deltas:
            return adapter.dense[f"{PREFIX}{name}"].to(tensor.dtype)
        delta = next(deltas)
        tensor.view(-1).index_copy_(0, delta.indices, _merged(name, delta, tensor, strange))
        return tensor

    with replacing(folder, force) as temporary:
        copy_with_changes(base, temporary, progress(names, "Merging"), merged)
    _warn_of(strange, base)


def _merged(name: str, delta: SparseDelta, base: Tensor, strange: list[str]) -> Tensor:
    """The merged values of a child network; adds the name to `strange` if the base has other values than it had."""
    values = base.reshape(-1).index_select(0, delta.indices)
    if fingerprints_differ(delta.fingerprint, fingerprint_of_values(values)):
        strange.append(name)
    return rounded_sum(values, delta.values)


def _warn_of(strange: list[str], base: Checkpoint) -> None:
    if strange:
        warnings.warn(_strange(base, strange[0]), stacklevel=3)


def _strange(base: Checkpoint, name: str) -> str:
    return f"'{base.path}' has other weights than the adapter was made on, such as in '{name}'."


def export_patch(
    adapter: SparseAdapter, base: Checkpoint, file: str | Path, force: bool = False, progress: Progress = silent
) -> None:
    """Write the merged values of the child network as positions and absolute values of the checkpoint's tensors.

    The safetensors file has two tensors for each changed one: `NAME.indices`, flat row-major positions, int32, or
    int64 from 2**31 entries on; and `NAME.values`, what stands there after merging, in the dtype of the checkpoint.

    Args:
        adapter: The adapter, without modules saved whole.
        base: The checkpoint of its base model.
        file: The file to make.
        force: Replace a file that exists.
        progress: Wraps the loop over tensor names.

    Raises:
        NamesDifferError: If the checkpoint has other names than the model.
        ValueError: If a tensor has another size, or the adapter has modules saved whole.
        FileExistsError: If the file exists and `force` is not set.
    """
    if adapter.dense:
        raise ValueError(f"A patch holds entries only; '{next(iter(adapter.dense))}' was saved whole.")
    check_fits(adapter, base)
    strange: list[str] = []
    with replacing(file, force) as temporary, TensorWriter(temporary) as patch:
        names = list(adapter.deltas)
        for name, delta in zip(progress(names, "Merging"), read_ahead(adapter.deltas, names), strict=True):
            wide = delta.numel >= 1 << 31
            patch.add(f"{name}.indices", delta.indices.to(torch.int64 if wide else torch.int32))
            patch.add(f"{name}.values", _merged(name, delta, base[name], strange))
    _warn_of(strange, base)


def check_fits(adapter: SparseAdapter, base: Checkpoint) -> None:
    """Check that a checkpoint has the tensors that an adapter changes, with as many entries.

    Raises:
        NamesDifferError: If the checkpoint lacks a tensor of the adapter.
        ValueError: If a tensor has another size.
    """
    wanted = [*adapter.deltas, *(key.removeprefix(PREFIX) for key in adapter.dense)]
    missing = [name for name in wanted if name not in base.places]
    if missing:
        raise NamesDifferError(
            f"'{base.path}' has no tensor '{missing[0]}' ({len(missing)} of {len(wanted)} names are missing): the "
            "model has other names than its checkpoint, or the adapter belongs to another model."
        )
    sizes = adapter.sizes  # known of a folder without reading its deltas
    numels = {name: sizes[name].numel if name in sizes else adapter.deltas[name].numel for name in adapter.deltas}
    numels |= {key.removeprefix(PREFIX): tensor.numel() for key, tensor in adapter.dense.items()}
    for name, numel in numels.items():
        here = base.places[name].numel
        if here != numel:
            raise ValueError(f"'{name}' has {here} entries in '{base.path}', the adapter's has {numel}.")


def check_weights(adapter: SparseAdapter, base: Checkpoint, progress: Progress = silent) -> None:
    """Check that a checkpoint has the values that an adapter was made on, as far as the adapter knows them.

    Raises:
        ValueError: If a base value is another.
    """
    for name in progress(list(adapter.deltas), "Checking"):
        delta = adapter.deltas[name]
        if fingerprints_differ(delta.fingerprint, fingerprint_of(base[name], delta.indices)):
            raise ValueError(_strange(base, name))
