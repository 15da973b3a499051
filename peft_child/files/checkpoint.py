"""Model checkpoints in safetensors files, tensor by tensor, whatever their size.

A merged checkpoint has the files of its base, with other bytes in some tensors. So every file is streamed once from
beginning to end: tensors that change are read, changed and written, and everything else is copied.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_child.files.safetensors_io import copy_bytes, write_tensor


INDEX_NAME = "model.safetensors.index.json"
CHECKPOINT_NAME = "model.safetensors"

# Files that describe a model and hold no weights: configurations, tokenizers, chat templates, licences, remote code.
_VOCABULARIES = ("*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.tokenizer", "*.bpe", "*.codes", "*.txt")
DESCRIBING = ("*.json", "*.jinja", "*.py", *_VOCABULARIES)
LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")
# Named like files that describe the model, but about an adapter, other weights or a training run.
_OF_OTHERS = ("adapter_*", "*.index*.json", "trainer_state.json")
_OF_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt")


class StoredTensor(NamedTuple):
    """Where a tensor of a checkpoint is stored.

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

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)


class Checkpoint:
    """The tensors of a checkpoint, read on access.

    Args:
        path: A safetensors file, an index of several, or a folder, which is read as transformers does.

    Attributes:
        path: The file or folder.
        places: Where each tensor is stored, by name.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a file is no safetensors file, or a shard lacks a tensor that the index names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.places: dict[str, StoredTensor] = {}
        for file in _weight_files(self.path):
            self.places.update(_read_places(file))

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        with safe_open(self.places[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def in_file_order(self, names: Collection[str]) -> list[str]:
        """Names file by file, and inside a file in the order of the data."""
        return sorted(names, key=lambda name: (self.places[name].file, self.places[name].offset))


@contextmanager
def replacing(target: str | Path, force: bool) -> Iterator[Path]:
    """Give a temporary path for a file or folder, and move it to the target if the block ends without an error.

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
    # Beside the target, and so in its file system, where moving it is a rename.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    _remove(temporary)
    try:
        yield temporary
        if target.is_dir():  # cannot be replaced in one step; a crash in between leaves no target, never a mixture
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            temporary.rename(target)
            _remove(old)
        else:
            temporary.replace(target)
    finally:
        _remove(temporary)


def copy_description(source: Path, folder: Path) -> None:
    """Copy the files that describe a model, but neither weights nor subfolders that hold some, such as exports."""
    # copyfile leaves permissions out: the source may be read-only.
    for item in sorted(source.iterdir()):
        if item.is_file() and _describes(item):
            shutil.copyfile(item, folder / item.name)
        # The target may lie inside the source, and must not be copied into itself.
        elif item.is_dir() and folder != item and item not in folder.parents and _holds_no_weights(item):
            shutil.copytree(item, folder / item.name, copy_function=shutil.copyfile)


def _holds_no_weights(folder: Path) -> bool:
    return all(_describes(inside) for inside in folder.rglob("*") if inside.is_file())


def _describes(file: Path) -> bool:
    def named(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(file.name, pattern) for pattern in patterns)

    return named((*DESCRIBING, *LICENCES)) and not named(_OF_OTHERS)


def copy_with_changes(
    checkpoint: Checkpoint, folder: Path, names: Iterable[str], change: Callable[[str, Tensor], Tensor]
) -> None:
    """Copy a checkpoint and the files that describe its model, with other values in some tensors.

    Args:
        checkpoint: The checkpoint to copy.
        folder: A folder that does not exist yet.
        names: The tensors to change, in the order of `checkpoint.in_file_order`.
        change: Takes a name and the checkpoint's tensor, which it may modify, and returns the tensor to write, of the
            same dtype and number of entries. It is called once for each name, in their order.
    """
    first, files = _first_file(checkpoint.path), set(_weight_files(checkpoint.path))
    folder.mkdir()
    if checkpoint.path.is_dir():
        copy_description(checkpoint.path, folder)
    if first not in files:  # an index
        shutil.copyfile(first, folder / first.name)
    for file, group in groupby(names, key=lambda name: checkpoint.places[name].file):
        _copy_file(checkpoint, file, folder / file.name, group, change)
        files.remove(file)
    for file in sorted(files):
        shutil.copyfile(file, folder / file.name)


def _copy_file(
    checkpoint: Checkpoint, file: Path, copied: Path, names: Iterable[str], change: Callable[[str, Tensor], Tensor]
) -> None:
    """Stream a file to its copy; `names` are the tensors to change in it, in file order."""
    with file.open("rb") as source, copied.open("wb") as target:
        for name in names:
            place = checkpoint.places[name]
            copy_bytes(source, target, place.offset - source.tell())
            written = write_tensor(change(name, checkpoint[name].clone()), target)  # a copy, since the file is mapped
            if written != place.num_bytes:
                raise ValueError(f"'{name}' must keep its {place.num_bytes} bytes in '{file}', got {written}.")
            source.seek(place.num_bytes, os.SEEK_CUR)
        copy_bytes(source, target, file.stat().st_size - source.tell())


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in `config.json` of a folder; empty if there is no such file, or it does not hold an object."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _first_file(path: Path) -> Path:
    """The file that transformers loads first: the one that the configuration names, the only one, or an index."""
    named = None if path.is_file() else read_config(path).get("transformers_weights")
    names = [CHECKPOINT_NAME, INDEX_NAME] if named is None else [_checked(str(named), path / "config.json")]
    found = [path, *(path / name for name in names)]
    for file in found:
        if file.is_file():
            return file
    others = sorted(file.name for file in path.glob("*.*") if file.suffix in _OF_WEIGHTS)
    way_out = "pass the path of a safetensors file itself, and convert other formats to safetensors first"
    hint = f" It has '{others[0]}': {way_out}." if others else ""
    raise FileNotFoundError(
        f"'{path}' is neither a safetensors file nor a folder with '{names[0]}'"
        + (f" or an index of it.{hint}" if named is None else f", which its configuration names.{hint}")
    )


def _checked(name: str, source: Path) -> str:
    if Path(name).name != name:  # checkpoints of strangers must not make us read or write elsewhere
        raise ValueError(f"'{source}' names files outside its own folder.")
    return name


def _weight_files(path: Path) -> list[Path]:
    index = _first_file(path)
    if index.suffix != ".json":
        return [index]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{index}' is not a checkpoint index: it needs a 'weight_map' of file names.") from error
    return [index.parent / _checked(name, index) for name in names]


def _read_places(file: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of a file are; the library checks the header, but does not expose the offsets."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"'{file}' is not a safetensors file: {error}.") from error
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
    start = 8 + length
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
