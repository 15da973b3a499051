"""Patch files: other values for some entries of a checkpoint's tensors, for engines that hold the checkpoint.

The format is written down in docs/format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_child.files.adapter_folder import SparseAdapter
from peft_child.files.adapter_tensors import PREFIX, checksum_of
from peft_child.files.checkpoint import Checkpoint, replacing
from peft_child.files.merge import check_fits, merged_values, warn_of_mismatch
from peft_child.files.safetensors_io import TensorWriter
from peft_child.tensors.codec import FormatError
from peft_child.tensors.delta import Progress, silent
from peft_child.tensors.lazy import Lazy, read_ahead


METADATA_KEY = "peft_child_patch"
PATCH_VERSION = 1
MOST_DIMENSIONS = 64  # as torch has
PATCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_INDICES, _VALUES = ".indices", ".values"  # endings of the names in a file


class TensorPatch(NamedTuple):
    """Other values for some entries of a tensor.

    Attributes:
        shape: Shape of the tensor.
        indices: Flat row-major positions, int32 or int64, shape `(k,)`, strictly increasing.
        values: The new values there, of the tensor's dtype, shape `(k,)`.
        before: CRC-32 of the bytes of the values that they replace; 0 if unknown.
        replaced: The values that they replace, if they are at hand.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    before: int = 0
    replaced: Tensor | None = None


@dataclass
class Patch:
    """Other values for some entries of a checkpoint.

    Attributes:
        tensors: By name of the tensor in the checkpoint.
        origin: Where the values come from, for people.
    """

    tensors: Mapping[str, TensorPatch]
    origin: dict[str, Any] = field(default_factory=dict)


def export_patch(
    adapter: SparseAdapter,
    base: Checkpoint,
    file: str | Path,
    force: bool = False,
    progress: Progress = silent,
    undo: str | Path | None = None,
    source: str | None = None,
) -> None:
    """Write what merging an adapter changes in a checkpoint.

    Args:
        adapter: The adapter, without modules saved whole.
        base: The checkpoint of its base model.
        file: The file to make.
        force: Replace files that exist.
        progress: Wraps the loop over tensor names.
        undo: A second file to make, the patch that leads back to the base.
        source: Name of the adapter on the Hub, for the origin in the file.

    Raises:
        NamesDifferError: If the checkpoint has other names than the model.
        ValueError: If a tensor has another size, a merged value is not finite, or modules were saved whole.
        FileExistsError: If a file exists and `force` is not set.
    """
    if adapter.dense:
        raise ValueError(f"A patch holds entries only; '{next(iter(adapter.dense))}' was saved whole: merge instead.")
    check_fits(adapter, base)
    mismatched: list[str] = []
    names = list(adapter.deltas)
    changes = Lazy(names, lambda name: tensor_patch(adapter, name, base[name], mismatched))
    origin = {"adapter": source, "base_model": adapter.settings.get("base_model_name_or_path"), "undo": False}
    with ExitStack() as files:
        add = files.enter_context(_writing(file, origin, force))
        add_undo = None if undo is None else files.enter_context(_writing(undo, {**origin, "undo": True}, force))
        for name, part in zip(progress(names, "Writing"), read_ahead(changes, names), strict=True):
            add(name, part)
            if add_undo is not None:
                add_undo(name, reversed_patch(part))
    warn_of_mismatch(mismatched, base)


def tensor_patch(adapter: SparseAdapter, name: str, tensor: Tensor, mismatched: list[str]) -> TensorPatch:
    """What merging an adapter changes in a checkpoint's tensor; adds the name to `mismatched` if its values differ.

    A tensor that was saved whole has all of its entries in the patch.
    """
    if name in adapter.deltas:
        delta = adapter.deltas[name]
        indices = delta.indices
        replaced, values = merged_values(name, delta, tensor, mismatched)
    else:
        indices = torch.arange(tensor.numel())
        replaced = tensor.flatten().clone()  # files may be mapped, and change
        values = adapter.dense[f"{PREFIX}{name}"].flatten().to(tensor.dtype, copy=True)
    indices = indices.to(index_dtype(tensor.numel()))
    return TensorPatch(tuple(tensor.shape), indices, values, checksum_of(replaced), replaced)


def reversed_patch(patch: TensorPatch) -> TensorPatch:
    """The patch that leads back, of one that has what it replaces."""
    assert patch.replaced is not None
    return TensorPatch(patch.shape, patch.indices, patch.replaced, checksum_of(patch.values), patch.values)


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of flat positions in a tensor with `numel` entries."""
    return torch.int32 if numel < 1 << 31 else torch.int64


def write_patch(file: str | Path, patch: Patch, force: bool = False) -> None:
    """Write a patch file; every tensor of the patch is read once.

    Raises:
        ValueError: If a value is not finite.
        FileExistsError: If the file exists and `force` is not set.
    """
    with _writing(file, patch.origin, force) as add:
        for name in patch.tensors:
            add(name, patch.tensors[name])


@contextmanager
def _writing(file: str | Path, origin: Mapping[str, Any], force: bool) -> Iterator[Callable[[str, TensorPatch], None]]:
    """Give a function that adds the patch of a tensor to a file, which is made if the block ends without an error."""
    about: dict[str, Any] = {}
    with replacing(file, force) as temporary, TensorWriter(temporary) as writer:

        def add(name: str, part: TensorPatch) -> None:
            if not part.values.isfinite().all():
                raise ValueError(f"The values of a patch must be finite; some of '{name}' are not.")
            writer.add(f"{name}{_INDICES}", part.indices)
            writer.add(f"{name}{_VALUES}", part.values)
            about[name] = {"shape": list(part.shape), "before": part.before, "after": checksum_of(part.values)}

        yield add
        described = {"version": PATCH_VERSION, "origin": origin, "tensors": about}
        writer.metadata[METADATA_KEY] = json.dumps(described, sort_keys=True)


def open_patch(file: str | Path) -> Patch:
    """Open a patch file; every tensor is read and checked on access.

    Raises:
        FileNotFoundError: If there is no such file.
        FormatError: If it is no patch file, or is not valid. Access to a damaged tensor raises it too.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no patch file '{file}'.")
    try:
        with safe_open(file, framework="pt") as tensors:
            described = (tensors.metadata() or {}).get(METADATA_KEY)
            keys = set(tensors.keys())
    except SafetensorError as error:
        raise FormatError(f"The patch '{file}' cannot be read: {error}.") from error
    if described is None:
        raise FormatError(f"'{file}' is not a patch file: its metadata has no '{METADATA_KEY}'.")
    about, origin = _parsed(described, file)
    expected = {f"{name}{ending}" for name in about for ending in (_INDICES, _VALUES)}
    if keys != expected:
        raise FormatError(
            f"The patch '{file}' must describe the tensors that it has; '{min(keys ^ expected)}' differs."
        )
    return Patch(Lazy(about, lambda name: _read(file, name, *about[name])), origin)


def _parsed(described: str, file: Path) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, Any]]:
    """Shape and the two checksums of every tensor, and the origin."""
    try:
        settings = json.loads(described)
        if settings["version"] != PATCH_VERSION:
            raise FormatError(
                f"The patch '{file}' has version {settings['version']!r}; this reader knows {PATCH_VERSION}."
            )
        about = {
            str(name): (_shape(each["shape"]), _count(each["before"]), _count(each["after"]))
            for name, each in settings["tensors"].items()
        }
        origin = dict(settings["origin"])
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"The metadata of the patch '{file}' are not valid: {error!r:.200}.") from error
    return about, origin


def _shape(sizes: Sequence[object]) -> tuple[int, ...]:
    if len(sizes) > MOST_DIMENSIONS:  # a product of many large numbers would take hours
        raise ValueError(f"more than {MOST_DIMENSIONS} dimensions: {len(sizes)}")
    shape = tuple(map(_count, sizes))
    _count(math.prod(shape))
    return shape


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"not a count: {value!r:.50}")
    return value


def _read(file: Path, name: str, shape: tuple[int, ...], before: int, after: int) -> TensorPatch:
    """Read and check the patch of one tensor."""
    with safe_open(file, framework="pt") as tensors:
        indices, values = tensors.get_tensor(f"{name}{_INDICES}"), tensors.get_tensor(f"{name}{_VALUES}")
    numel = math.prod(shape)
    wrong = None
    if indices.dtype not in (torch.int32, torch.int64) or values.dtype not in PATCH_DTYPES:
        wrong = f"its indices are {indices.dtype} and its values {values.dtype}"
    elif indices.dim() != 1 or indices.shape != values.shape:
        wrong = f"its indices have the shape {tuple(indices.shape)} and its values {tuple(values.shape)}"
    elif not len(indices) or indices[0] < 0 or indices[-1] >= numel or not (indices[1:] > indices[:-1]).all():
        wrong = f"its indices must be increasing, between 0 and {numel - 1}"
    elif not values.isfinite().all():
        wrong = "a value is not finite"
    elif checksum_of(values) != after:
        wrong = "the checksum of its values does not match"
    if wrong:
        raise FormatError(f"The patch of '{name}' in '{file}' cannot be used: {wrong}.")
    # Copies, since the file is mapped, and may change.
    return TensorPatch(shape, indices.to(index_dtype(numel), copy=True), values.clone(), before)
