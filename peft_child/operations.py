"""What can be done with adapters and checkpoints on disk, without a model: extract, merge, combine, compare, patch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_child.adapter_folder import PEFT_TYPE, SparseAdapter
from peft_child.checkpoint import Checkpoint, copy_with_changes, replacing
from peft_child.config import OF_OTHERS
from peft_child.delta import (
    Overlap,
    Progress,
    SparseDelta,
    change,
    combine_named,
    count_different,
    extract_delta,
    merged_values,
    overlap,
    silent,
)
from peft_child.selection import Cutoff, choose, find_cutoff
from peft_child.sparse_file import PREFIX, fingerprint_of, fingerprint_of_values, fingerprints_differ
from peft_child.streaming import TensorWriter


FLOATING = ("F32", "BF16", "F16", "F64")


class NamesDifferError(ValueError):
    """An adapter's parameters have other names in a checkpoint, which transformers renames on loading."""


# Extract


class _Comparison(NamedTuple):
    """Two checkpoints, and the floating point tensors to compare."""

    base: Checkpoint
    tuned: Checkpoint
    names: list[str]

    def change(self, name: str) -> Tensor:
        return change(self.base[name], self.tuned[name])


class _Changes(Mapping[str, Tensor]):
    """Absolute changes between two checkpoints, computed when they are asked for."""

    def __init__(self, compared: _Comparison, progress: Progress) -> None:
        self.compared, self.progress = compared, progress

    def __getitem__(self, name: str) -> Tensor:
        return self.compared.change(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.progress(self.compared.names, "Comparing")

    def __len__(self) -> int:
        return len(self.compared.names)


class _Extracted(Mapping[str, SparseDelta]):
    """Deltas between two checkpoints, computed when they are asked for; only their sizes are kept.

    Attributes:
        compared: The checkpoints.
        counts: Entries that are chosen, by name of the tensor, where there are any.
        cutoffs: What the changes must reach, by name of the tensor; None where all that differ are chosen.
    """

    def __init__(self, compared: _Comparison, cutoff: Cutoff | None, progress: Progress) -> None:
        self.compared = compared
        self.counts: dict[str, int] = {}
        self.cutoffs: dict[str, Cutoff | None] = {}
        for name in progress(compared.names, "Counting"):
            self.cutoffs[name] = cutoff
            if cutoff is None:
                count = count_different(compared.base[name], compared.tuned[name])
            else:
                indices, cutoff = choose(compared.change(name), cutoff)
                count = indices.numel()
            if count:
                self.counts[name] = count

    def __getitem__(self, name: str) -> SparseDelta:
        if name not in self.counts:
            raise KeyError(name)
        before, after, cutoff = self.compared.base[name], self.compared.tuned[name], self.cutoffs[name]
        try:
            delta = extract_delta(before, after, None if cutoff is None else choose(change(before, after), cutoff)[0])
        except ValueError as error:
            raise ValueError(f"The change of '{name}' cannot be kept. {error}") from error
        matrix = (before.shape[0], before[0].numel()) if before.dim() else (1, 1)
        return delta._replace(shape=matrix, fingerprint=fingerprint_of(before, delta.indices))

    def __contains__(self, name: object) -> bool:
        return name in self.counts

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def extract_adapter(
    base: Checkpoint, tuned: Checkpoint, density: float | None = None, progress: Progress = silent
) -> SparseAdapter:
    """Make an adapter of the difference between two checkpoints of the same shapes.

    Without a density every entry that differs in a bit belongs to the child network, and merging the adapter into the
    base gives the tuned checkpoint bit for bit. With a density the child network has exactly `round(density * n)` of
    the n floating point entries, those that changed most. Tensors are read one at a time, and every delta is computed
    when it is asked for, so the checkpoints have to stay as they are until the adapter is written.

    Changes of integer and FP8 tensors are refused, since no delta expresses them; and without a density also a change
    between two numbers whose difference needs more than the 53 bits of a float64, such as from 1e30 to 1.
    The adapter has the names of the checkpoint. They fit `merge_checkpoint` and `export_patch` always, but PEFT only
    if the model has the same ones: transformers renames or fuses tensors of some architectures on loading.

    Args:
        base: The checkpoint before fine-tuning.
        tuned: The checkpoint after it.
        density: Share of the entries to keep, in (0, 1], or None for all that differ.
        progress: Wraps the loops over tensor names.

    Returns:
        The adapter. Asking for a delta raises `ValueError` if it cannot express the change exactly, where that is
        promised.

    Raises:
        ValueError: If the checkpoints have other tensors or shapes, nothing differs, a tensor that is not floating
            point differs, or `density` is out of range.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}.")
    compared = _Comparison(base, tuned, _comparable(base, tuned))
    numel = sum(_numel(base, name) for name in compared.names)
    cutoff = None if density is None else find_cutoff(_Changes(compared, progress), round(density * numel))
    deltas = _Extracted(compared, cutoff, progress)
    if not deltas:
        raise ValueError(f"'{base.path}' and '{tuned.path}' do not differ in any floating point entry.")
    for name in deltas:
        if "." not in name:
            raise ValueError(f"'{name}' belongs to the top-level module, which an adapter cannot reach.")
    settings = {
        "peft_type": PEFT_TYPE,
        "variant": "extracted",
        "density": density or sum(deltas.counts.values()) / numel,
        "target_parameters": list(deltas),
        "base_model_name_or_path": str(base.path),
    }
    return SparseAdapter(settings, deltas)


def _comparable(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Floating point tensors that both have, after a check that they have the same ones."""
    for first, second in ((base, tuned), (tuned, base)):
        missing = sorted(first.places.keys() - second.places.keys())
        if missing:
            raise ValueError(
                f"'{second.path}' lacks {len(missing)} tensors of '{first.path}', such as '{missing[0]}'."
            )
    for name, place in base.places.items():
        other = tuned.places[name]
        if (place.dtype, place.shape) != (other.dtype, other.shape):
            raise ValueError(
                f"'{name}' is {place.dtype} {place.shape} in '{base.path}' and {other.dtype} {other.shape} in "
                f"'{tuned.path}'; they must be the same."
            )
    names = [name for name, place in base.places.items() if place.dtype in FLOATING and 0 not in place.shape]
    for name in base.places.keys() - set(names):
        if not torch.equal(base[name], tuned[name]):
            raise ValueError(
                f"'{name}' differs and is {base.places[name].dtype}; only floating point changes can be kept."
            )
    return names


def _numel(checkpoint: Checkpoint, name: str) -> int:
    numel = 1
    for size in checkpoint.places[name].shape:
        numel *= size
    return numel


# Merge and patch


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
    strange: list[str] = []

    def merged(name: str, tensor: Tensor) -> Tensor:
        if name not in adapter.deltas:
            return adapter.dense[f"{PREFIX}{name}"].to(tensor.dtype)
        delta = adapter.deltas[name]
        tensor.view(-1)[delta.indices] = _merged(name, delta, tensor, strange)
        return tensor

    with replacing(folder, force) as temporary:
        copy_with_changes(base, temporary, progress(names, "Merging"), merged)
    _warn_of(strange, base)


def _merged(name: str, delta: SparseDelta, base: Tensor, strange: list[str]) -> Tensor:
    """The merged values of a child network; adds the name to `strange` if the base has other values than it had."""
    values = base.reshape(-1)[delta.indices]
    if fingerprints_differ(delta.fingerprint, fingerprint_of_values(values)):
        strange.append(name)
    return merged_values(values, delta)


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
        for name in progress(list(adapter.deltas), "Merging"):
            delta = adapter.deltas[name]
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
    numels = {name: size[0] for name, size in adapter.sizes.items()}
    numels |= {key.removeprefix(PREFIX): tensor.numel() for key, tensor in adapter.dense.items()}
    for name, numel in numels.items():
        if _numel(base, name) != numel:
            raise ValueError(f"'{name}' has {_numel(base, name)} entries in '{base.path}', the adapter's has {numel}.")


def check_weights(adapter: SparseAdapter, base: Checkpoint, progress: Progress = silent) -> None:
    """Check that a checkpoint has the values that an adapter was made on, as far as the adapter knows them.

    Raises:
        ValueError: If a base value is another.
    """
    for name in progress(list(adapter.deltas), "Checking"):
        delta = adapter.deltas[name]
        if fingerprints_differ(delta.fingerprint, fingerprint_of(base[name], delta.indices)):
            raise ValueError(_strange(base, name))


# Combine and compare


def combine_adapters(
    adapters: Sequence[SparseAdapter],
    weights: Sequence[float],
    *,
    combination_type: str = "linear",
    density: float = 1.0,
    majority_sign_method: str = "total",
    seed: int = 0,
    progress: Progress = silent,
) -> SparseAdapter:
    """Combine adapters of one base model; see `combine_deltas` for what the arguments mean.

    Every delta is combined when it is asked for, so that memory is that of one tensor, and again if it is asked again.

    Raises:
        ValueError: If an argument is out of range, an adapter has modules saved whole, or tensors differ in shape.
    """
    for adapter in adapters:
        if adapter.dense and len(adapters) > 1:
            raise ValueError(f"Modules saved whole cannot be combined, and '{next(iter(adapter.dense))}' is one.")
    options = {
        "combination_type": combination_type,
        "density": density,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
    }
    deltas = _Combined([adapter.deltas for adapter in adapters], weights, options, progress)
    settings = dict(adapters[0].settings)
    if len(adapters) > 1 and deltas:
        chosen, numel = (sum(column) for column in zip(*deltas.sizes.values(), strict=True))
        settings |= {**OF_OTHERS, "density": chosen / numel, "target_parameters": list(deltas)}
    return SparseAdapter(settings, deltas, adapters[0].dense)


class _Combined(Mapping[str, SparseDelta]):
    """Combinations of deltas, computed when they are asked for; only their sizes are kept.

    Attributes:
        sizes: Chosen entries and entries, by name of the tensor.
    """

    def __init__(
        self,
        adapters: Sequence[Mapping[str, SparseDelta]],
        weights: Sequence[float],
        options: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.adapters, self.weights, self.options = adapters, weights, options
        combine_named([{} for _ in adapters], weights, **options)  # checks the arguments
        names = list(dict.fromkeys(name for deltas in adapters for name in deltas))
        self.sizes: dict[str, tuple[int, int]] = {}
        for name in progress(names, "Combining"):
            delta = self._combine(name)
            self.sizes[name] = delta.indices.numel(), delta.numel

    def _combine(self, name: str) -> SparseDelta:
        here = [{name: deltas[name]} if name in deltas else {} for deltas in self.adapters]
        return combine_named(here, self.weights, **self.options)[name]

    def __getitem__(self, name: str) -> SparseDelta:
        if name not in self.sizes:
            raise KeyError(name)
        return self._combine(name)

    def __contains__(self, name: object) -> bool:
        return name in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def compare_adapters(adapters: Sequence[SparseAdapter]) -> dict[tuple[int, int], dict[str, Overlap]]:
    """Overlap of the child networks of every two adapters, by their positions, in every tensor that either changes."""
    found: dict[tuple[int, int], dict[str, Overlap]] = {}
    for first, second in combinations(range(len(adapters)), 2):
        deltas = adapters[first].deltas, adapters[second].deltas
        names = dict.fromkeys([*deltas[0], *deltas[1]])
        found[first, second] = {name: _overlap(name, deltas[0].get(name), deltas[1].get(name)) for name in names}
    return found


def _overlap(name: str, first: SparseDelta | None, second: SparseDelta | None) -> Overlap:
    if first is None or second is None:
        some = first or second
        assert some is not None
        none = some._replace(indices=some.indices[:0], values=some.values[:0])
        return overlap(first or none, second or none)
    if first.numel != second.numel:
        raise ValueError(f"'{name}' has {first.numel} entries in one adapter and {second.numel} in another.")
    return overlap(first, second)
