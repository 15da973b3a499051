"""An adapter and a checkpoint: merge them, or check that they fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_child.files.adapter_folder import SparseAdapter, classes_of
from peft_child.files.adapter_tensors import PREFIX, fingerprint_of, fingerprint_of_values, fingerprints_differ
from peft_child.files.checkpoint import Checkpoint, copy_with_changes, read_config, replacing
from peft_child.tensors.delta import Progress, SparseDelta, rounded_sum, silent
from peft_child.tensors.lazy import read_ahead


class NamesDifferError(ValueError):
    """A checkpoint has other tensors than an adapter names: transformers renames them on loading, or a head is new."""


def merge_checkpoint(
    adapter: SparseAdapter, base: Checkpoint, folder: str | Path, force: bool = False, progress: Progress = silent
) -> int:
    """Write a checkpoint with the adapter merged, in files like the base's, with its configuration and tokenizer.

    The values are those of `merge_and_unload()`, bit for bit. Memory is a few times the largest tensor.

    Args:
        adapter: The adapter.
        base: The checkpoint of its base model.
        folder: The folder to make.
        force: Replace a folder that exists.
        progress: Wraps the loop over tensor names.

    Returns:
        How many deltas other than zero are too small to change the rounded weight, as in a base of half precision.

    Raises:
        NamesDifferError: If the checkpoint has other names than the model, or lacks a module that was saved whole, or
            has it in another size.
        ValueError: If a tensor has another size.
        FileExistsError: If the folder exists and `force` is not set.
    """
    check_fits(adapter, base)
    names = base.in_file_order([*adapter.deltas, *(key.removeprefix(PREFIX) for key in adapter.dense)])
    deltas = read_ahead(adapter.deltas, [name for name in names if name in adapter.deltas])
    mismatched: list[str] = []  # found while merging, since a check of its own would read these tensors twice
    hidden = 0

    def merged(name: str, tensor: Tensor) -> Tensor:
        nonlocal hidden
        if name not in adapter.deltas:
            return adapter.dense[f"{PREFIX}{name}"].to(tensor.dtype)
        delta = next(deltas)  # tensors come in the order of `names`, and so do the deltas
        before, values = merged_values(name, delta, tensor, mismatched)
        hidden += int((delta.values.ne(0) & values.eq(before)).sum())
        tensor.view(-1).index_copy_(0, delta.indices, values)
        return tensor

    with replacing(folder, force) as temporary:
        copy_with_changes(base, temporary, progress(names, "Merging"), merged)
        _write_classes(temporary / "config.json", classes_of(adapter.settings))
    warn_of_mismatch(mismatched, base)
    return hidden


def _write_classes(file: Path, classes: Mapping[str, Any]) -> None:
    """Give the configuration of a merged model the classes of its new head."""
    before = read_config(file.parent)
    after = before | json.loads(json.dumps(classes))  # where numbers of classes are strings
    if file.exists() and after != before:
        file.write_text(json.dumps(after, indent=2) + "\n", "utf-8")


def merged_values(name: str, delta: SparseDelta, base: Tensor, mismatched: list[str]) -> tuple[Tensor, Tensor]:
    """The base values of a child network and the merged ones, each of shape `(k,)`.

    Adds the name to `mismatched` if the fingerprints of the base differ.
    """
    values = base.reshape(-1).index_select(0, delta.indices)
    if fingerprints_differ(delta.fingerprint, fingerprint_of_values(values)):
        mismatched.append(name)
    return values, rounded_sum(values, delta.values)


def warn_of_mismatch(mismatched: list[str], base: Checkpoint) -> None:
    """Warn that a checkpoint is not the base of an adapter, if `merged_values` found tensors that differ."""
    if mismatched:
        warnings.warn(mismatch(base, mismatched[0]), stacklevel=3)


def mismatch(base: Checkpoint, name: str) -> str:
    """What is wrong if the base values of a tensor differ."""
    return f"The weights in '{base.path}' are not those that the adapter was made on; '{name}' is one that differs."


def check_fits(adapter: SparseAdapter, base: Checkpoint) -> None:
    """Check that a checkpoint has the tensors that an adapter changes, with as many entries.

    Raises:
        NamesDifferError: If the checkpoint lacks a tensor of the adapter, or has one in another size that was saved
            whole.
        ValueError: If another tensor has another size.
    """
    wanted = [*adapter.deltas, *(key.removeprefix(PREFIX) for key in adapter.dense)]
    missing = [name for name in wanted if name not in base.places]
    if missing:
        reason = "the model has other names than its checkpoint, or the adapter belongs to another model."
        prefix, _, rest = missing[0].partition(".")
        if rest in base.places:
            reason = f"the names of the checkpoint lack the prefix '{prefix}.' of the model."
        elif len(missing) < len(wanted) and any(f"{PREFIX}{name}" in adapter.dense for name in missing):
            reason = "the checkpoint lacks some parts of the model, such as a new head."
        count = f"{len(missing)} of {len(wanted)} names are missing"
        raise NamesDifferError(f"'{base.path}' has no tensor '{missing[0]}' ({count}): {reason}")
    sizes = adapter.sizes  # known for an adapter read from a folder, whose deltas need not be read then
    for key, tensor in adapter.dense.items():
        name = key.removeprefix(PREFIX)
        if (here := base.places[name].numel) != tensor.numel():
            raise NamesDifferError(
                f"'{name}' has {here} entries in '{base.path}', but {tensor.numel()} in the adapter, which has it "
                "whole: the adapter has another head."
            )
    numels = {name: sizes[name].numel if name in sizes else adapter.deltas[name].numel for name in adapter.deltas}
    for name, numel in numels.items():
        here = base.places[name].numel
        if here != numel:
            quantised = " If the checkpoint is quantised, give the one that it was made from." if here < numel else ""
            raise ValueError(f"'{name}' has {here} entries in '{base.path}', but {numel} in the adapter.{quantised}")


def check_weights(adapter: SparseAdapter, base: Checkpoint, progress: Progress = silent) -> None:
    """Check that a checkpoint has the base values that an adapter was made on, by all fingerprints that it has.

    Raises:
        ValueError: If a fingerprint differs.
    """
    for name in progress(list(adapter.deltas), "Checking"):
        delta = adapter.deltas[name]
        if fingerprints_differ(delta.fingerprint, fingerprint_of(base[name], delta.indices)):
            raise ValueError(mismatch(base, name))
