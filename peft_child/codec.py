"""Sorted flat indices as bytes and back.

Child networks are dense sets of positions with structure, so a compressed bitmap beats lists of integers by far; for
very sparse ones, compressed gaps are smaller. Each block describes and checks itself, because the place where PEFT
writes it has no room for metadata.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


MAGIC = b"PCHI"
VERSION = 1
BITMAP, GAPS = 1, 2
LEVEL = 6

_HEADER = struct.Struct("<4sBB2xQQI")  # magic, version, encoding, numel, count, CRC-32 of all the rest
_CHECKSUM = struct.Struct("<I")

Indices = npt.NDArray[np.int64]


class FormatError(ValueError):
    """Stored bytes that cannot be an adapter of this package; the message says which tensor and what is wrong."""


class Header(NamedTuple):
    """What a block says of itself.

    Attributes:
        encoding: How the positions are written, `BITMAP` or `GAPS`.
        numel: Number of entries of the tensor.
        size: Number of chosen entries, at least 1.
    """

    encoding: int
    numel: int
    size: int


def encode(indices: Indices, numel: int) -> bytes:
    """Write strictly increasing positions in the smaller of two encodings.

    Args:
        indices: Flat positions, int64, shape `(k,)`, strictly increasing, in `[0, numel)`, at least one.
        numel: Number of entries of the tensor.

    Returns:
        The block. Equal input gives equal bytes.

    Raises:
        ValueError: If the positions are not as described.
    """
    _check_indices(indices, numel, ValueError)
    payloads = {GAPS: _encode_gaps(indices)}
    if numel <= 64 * indices.size:  # sparser bitmaps never win, and would cost memory of the size of the tensor
        payloads[BITMAP] = _encode_bitmap(indices, numel)
    encoding = min(payloads, key=lambda kind: (len(payloads[kind]), kind))
    head = _HEADER.pack(MAGIC, VERSION, encoding, numel, indices.size, 0)[: -_CHECKSUM.size]
    return head + _CHECKSUM.pack(zlib.crc32(payloads[encoding], zlib.crc32(head))) + payloads[encoding]


def read_header(block: bytes | memoryview) -> Header:
    """Check a block's header and checksum.

    Raises:
        FormatError: If the block is too short, of another kind or version, or changed.
    """
    if len(block) < _HEADER.size:
        raise FormatError(f"A child index block has at least {_HEADER.size} bytes, got {len(block)}.")
    magic, version, encoding, numel, count, checksum = _HEADER.unpack_from(block)
    if magic == bytes(4):
        raise FormatError("The child index block is empty: it was allocated, but no adapter file was loaded into it.")
    if magic != MAGIC:
        raise FormatError(f"A child index block starts with {MAGIC!r}, got {magic!r}.")
    if version != VERSION:
        raise FormatError(f"This version of peft_child reads child index blocks of version {VERSION}, got {version}.")
    head = bytes(block[: _HEADER.size - _CHECKSUM.size])
    if zlib.crc32(block[_HEADER.size :], zlib.crc32(head)) != checksum:
        raise FormatError("The checksum of the child index block does not match its content.")
    if not 1 <= count <= numel:
        raise FormatError(f"A child index block holds from 1 to {numel} positions, its header says {count}.")
    return Header(encoding, numel, count)


def decode(block: bytes | memoryview) -> Indices:
    """Read the positions of a block.

    Returns:
        Flat positions, int64, shape `(count,)`, strictly increasing.

    Raises:
        FormatError: If the block is not what `encode` writes.
    """
    header = read_header(block)
    payload = block[_HEADER.size :]
    if header.encoding == BITMAP:
        indices = _decode_bitmap(payload, header.numel)
    elif header.encoding == GAPS:
        indices = _decode_gaps(payload, header.size)
    else:
        raise FormatError(f"Unknown encoding {header.encoding} of a child index block.")
    if indices.size != header.size:
        raise FormatError(f"A child index block says {header.size} positions and holds {indices.size}.")
    _check_indices(indices, header.numel, FormatError)
    return indices


def _check_indices(indices: Indices, numel: int, error: type[ValueError]) -> None:
    if not indices.size:
        raise error("A child index block holds at least one position, got none.")
    if indices[0] < 0 or indices[-1] >= numel:
        raise error(f"Positions must lie in [0, {numel}), got {indices[0]} to {indices[-1]}.")
    falls = np.flatnonzero(indices[1:] <= indices[:-1])
    if falls.size:
        at = int(falls[0])
        raise error(f"Positions must be strictly increasing; entry {at + 1} is {indices[at + 1]} after {indices[at]}.")


def _encode_bitmap(indices: Indices, numel: int) -> bytes:
    bits = np.zeros(numel, dtype=np.bool_)
    bits[indices] = True
    return zlib.compress(np.packbits(bits, bitorder="little").tobytes(), LEVEL)


def _decode_bitmap(payload: bytes | memoryview, numel: int) -> Indices:
    packed = np.frombuffer(_decompress(payload, (numel + 7) // 8), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")
    if bits[numel:].any():
        raise FormatError(f"The bitmap of a child index block has positions beyond {numel}.")
    return np.flatnonzero(bits[:numel])


def _encode_gaps(indices: Indices) -> bytes:
    """Gaps less one, as bytes of equal weight side by side: the high ones are mostly zero and cost nothing."""
    gaps = np.diff(indices, prepend=-1) - 1
    width = max(1, (int(gaps.max()).bit_length() + 7) // 8)
    planes = gaps.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width]
    return bytes([width]) + zlib.compress(np.ascontiguousarray(planes.T).tobytes(), LEVEL)


def _decode_gaps(payload: bytes | memoryview, count: int) -> Indices:
    width = payload[0] if len(payload) else 0
    if not 1 <= width <= 8:
        raise FormatError(f"The gaps of a child index block take from 1 to 8 bytes, got {width}.")
    planes = np.frombuffer(_decompress(payload[1:], width * count), dtype=np.uint8).reshape(width, count)
    gaps = np.zeros((count, 8), dtype=np.uint8)
    gaps[:, :width] = planes.T
    steps = gaps.view("<u8").reshape(-1).astype(np.int64) + 1
    return np.cumsum(steps) - 1


def _decompress(payload: bytes | memoryview, size: int) -> bytes:
    """Exactly `size` bytes; a payload that expands to more is noticed before it does."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(payload, size + 1)
    except zlib.error as error:
        raise FormatError(f"The payload of a child index block cannot be decompressed: {error}.") from error
    if len(data) != size or not stream.eof or stream.unused_data:
        raise FormatError(f"The payload of a child index block does not expand to exactly {size} bytes.")
    return data
