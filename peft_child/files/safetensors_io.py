"""Write files of any size piece by piece: ranges of other files, and tensors as they are computed."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor


METADATA = {"format": "pt"}  # as transformers and PEFT write it
_PIECE = 1 << 18  # bytes copied at a time; larger pieces fall out of the processor's cache


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy the next `count` bytes of a file; raises an `OSError` if it has fewer."""
    piece = memoryview(bytearray(min(_PIECE, count)))
    while count:
        part = piece[:count]
        if source.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise OSError(f"'{source.name}' ends before its tensors do.")
        target.write(part)
        count -= len(part)


def write_tensor(tensor: Tensor, target: BinaryIO) -> int:
    """Write the bytes of a tensor, row-major; returns their number."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return target.write(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class TensorWriter:
    """Writes a safetensors file, byte for byte as `safetensors.torch.save_file` does, from tensors one at a time.

    The format begins with the offsets of all tensors, and the library sorts them. So the tensors first go to a
    temporary file beside it. Use it in a `with` statement; the file is made when that ends without an error.

    Args:
        file: The file to make.

    Attributes:
        metadata: What the header says of the file, by key; it may be changed until the `with` statement ends.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata = dict(METADATA)
        self.spill = file.with_name(f"{file.name}.part")
        self.entries: dict[str, _Entry] = {}

    def __enter__(self) -> TensorWriter:
        """Open the temporary file."""
        self.parts = self.spill.open("w+b")
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which may be freed then."""
        offset = self.parts.tell()
        num_bytes = write_tensor(tensor, self.parts)
        self.entries[name] = _Entry(tensor.dtype, tuple(tensor.shape), offset, num_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the final file, if there was no error, and remove the temporary one."""
        try:
            with self.parts:
                if error is None:
                    self._assemble()
        finally:
            self.spill.unlink()

    def _assemble(self) -> None:
        header = self._header()
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()  # as the library does
        text += b" " * (-len(text) % 8)  # data are aligned to 8 bytes
        with self.file.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                if name in self.entries:
                    self.parts.seek(self.entries[name].offset)
                    copy_bytes(self.parts, target, self.entries[name].num_bytes)

    def _header(self) -> dict[str, Any]:
        """The library's header for one-entry tensors, for their order; shapes and offsets are then replaced."""
        small = {name: torch.zeros(1, dtype=entry.dtype) for name, entry in self.entries.items()}
        written = save(small, self.metadata)
        header: dict[str, Any] = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
        header["__metadata__"] = dict(sorted(self.metadata.items()))  # the library's order changes from run to run
        end = 0
        for name in header:
            if name in self.entries:  # all but the metadata
                entry = self.entries[name]
                start, end = end, end + entry.num_bytes
                header[name].update(shape=list(entry.shape), data_offsets=[start, end])
        return header
