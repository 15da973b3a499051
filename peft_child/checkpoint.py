"""Model checkpoints in safetensors files, tensor by tensor, whatever their size.

A merged checkpoint differs from its base in some bytes of some tensors. So it is made by copying the files, which the
operating system does best, and writing those bytes at their places in the copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"


class Place(NamedTuple):
    """Where a checkpoint has a tensor.

    Attributes:
        file: The safetensors file.
        dtype: The format's name of its dtype, such as `BF16`.
        shape: Its shape.
        offset: First byte of its data in the file.
        num_bytes: Bytes of its data.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """The tensors of a checkpoint, read when they are asked for.

    Args:
        path: A safetensors file, or a folder with `model.safetensors`, sharded or not.

    Attributes:
        path: The file or folder.
        places: By name of the tensor.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a file is no safetensors file, or a shard lacks a tensor that the index names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.places: dict[str, Place] = {}
        for file in _weight_files(self.path):
            self.places.update(_read_places(file))

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        with safe_open(self.places[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


@contextmanager
def replacing(target: str | Path, force: bool) -> Iterator[Path]:
    """A temporary name for a file or folder that takes its place at the end, whole or not at all.

    Args:
        target: The file or folder to make.
        force: Replace one that exists.

    Yields:
        A path that does not exist, beside the target.

    Raises:
        FileExistsError: If the target exists and `force` is not set.
    """
    target = Path(target)
    if target.exists() and not force:
        raise FileExistsError(f"'{target}' exists already; pass force (--force) to replace it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    _remove(temporary)
    try:
        yield temporary
        if target.is_dir():  # a folder cannot be replaced in one step; without the old one it is none or the new one
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            temporary.rename(target)
            _remove(old)
        else:
            temporary.replace(target)
    finally:
        _remove(temporary)


class Change(NamedTuple):
    """New values of some entries of a tensor, or of all.

    Attributes:
        name: The tensor.
        indices: Flat positions, int64, shape `(k,)`, or None for all entries.
        values: New values in the dtype that the checkpoint has, shape `(k,)`, or that of the tensor.
    """

    name: str
    indices: Tensor | None
    values: Tensor


def copy_with_changes(checkpoint: Checkpoint, folder: Path, changes: Iterable[Change]) -> None:
    """Copy a checkpoint and everything beside it, with other values for some entries.

    Args:
        checkpoint: The checkpoint to copy.
        folder: A folder that does not exist yet.
        changes: Taken one at a time, so they may be computed lazily.
    """
    if checkpoint.path.is_dir():
        shutil.copytree(checkpoint.path, folder)
    else:
        folder.mkdir()
        shutil.copyfile(checkpoint.path, folder / checkpoint.path.name)
    for change in changes:
        place = checkpoint.places[change.name]
        values = change.values.contiguous().reshape(-1)
        bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        copied = folder / place.file.name
        copied.chmod(copied.stat().st_mode | 0o200)
        entries = np.memmap(
            copied, bits.numpy().dtype, "r+", place.offset, (place.num_bytes // values.element_size(),)
        )
        entries[... if change.indices is None else change.indices.numpy()] = bits.numpy()
        entries.flush()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{index}' is no index of a checkpoint: it needs a 'weight_map' of file names."
            ) from error
        if any(Path(name).name != name for name in names):
            raise ValueError(f"'{index}' names files outside its own folder.")
        return [path / name for name in names]
    if (path / WEIGHTS_NAME).is_file():
        return [path / WEIGHTS_NAME]
    raise FileNotFoundError(f"'{path}' is no safetensors file, and no folder with '{WEIGHTS_NAME}' or an index of it.")


def _read_places(file: Path) -> dict[str, Place]:
    """The header of a safetensors file; the library checks it, but does not tell the offsets."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"'{file}' is no safetensors file: {error}.") from error
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
    start = 8 + length
    return {
        name: Place(file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
