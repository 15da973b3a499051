"""Sorted flat indices as bytes and back.

Child networks chosen by Fisher information are far from random: some rows and columns of a weight hold many more
chosen entries than others. So a bitmap compresses well, by rows or by columns, whichever repeats itself more. Sparse
child networks are stored as compressed gaps between positions instead. Each block carries its own header and checksum,
because PEFT writes no metadata.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from peft_child.tensors.channels import ChannelLayout


MAGIC = b"PCHI"
VERSION = 1
BITMAP, GAPS, ALL, CHANNELS = 1, 2, 3, 4
ROWS, COLUMNS = 0, 1

_HEADER = struct.Struct("<4sBBBxQQQIII")  # magic, version, the fields of Header, and a CRC-32 of everything else
_CHECKSUM = struct.Struct("<I")
_LAYOUT = struct.Struct("<QQQQ")  # the fields of ChannelLayout
HEADER_SIZE = _HEADER.size
_SPARSE = 12  # below a density of 1 / 12, gaps take the place of a bitmap
_PROBE = 1 << 16  # leading bytes that are tried to decide how to compress

Indices = npt.NDArray[np.int64]
Block = bytes | memoryview


class FormatError(ValueError):
    """Stored bytes that cannot be an adapter of this package; the message says which tensor and what is wrong."""


class Header(NamedTuple):
    """What a block says of itself.

    Attributes:
        encoding: How the positions are written, `BITMAP`, `GAPS` or `CHANNELS`, or `ALL` if there is nothing to write.
        order: The order that they are written in, `ROWS` or `COLUMNS`.
        numel: Number of entries of the tensor.
        width: Entries of a row; a divisor of `numel`.
        size: Number of chosen entries, at least 1.
        fingerprint: Of the base values at the chosen positions; 0 if unknown.
        delta_checksum: CRC-32 of the bytes of the delta that is stored with the block; 0 if unknown.
    """

    encoding: int
    order: int
    numel: int
    width: int
    size: int
    fingerprint: int
    delta_checksum: int


def encode(
    indices: Indices, shape: tuple[int, ...], fingerprint: int = 0, layout: ChannelLayout | None = None
) -> bytes:
    """Write the strictly increasing flat positions of a child network in a tensor.

    Args:
        indices: Row-major positions, int64, shape `(k,)`, strictly increasing, within the tensor, at least one.
        shape: Shape of the tensor.
        fingerprint: Of the base values at these positions, 32 bits; 0 if unknown.
        layout: If the child network consists of whole input channels, how they lie in the tensor.

    Returns:
        The block. Equal input gives equal bytes.

    Raises:
        ValueError: If the positions are not as described.
    """
    numel = int(np.prod(shape, dtype=np.int64))
    width = numel // shape[0] if shape else 1
    _check_indices(indices, numel, ValueError)
    encoding, order, payload = ALL, ROWS, b""
    if layout is not None:
        chosen = layout.holding(torch.from_numpy(indices)).numpy()
        encoding, payload = CHANNELS, zlib.compress(_LAYOUT.pack(*layout) + _gap_planes(chosen), 9)
    elif indices.size < numel:
        encoding = GAPS if _SPARSE * indices.size < numel else BITMAP
        write = _write_gaps if encoding == GAPS else _write_bitmap
        orders = [ROWS] if width in (1, numel) else [ROWS, COLUMNS]  # which are the same for a single row or column
        order, payload = _compressed(lambda order: write(indices, numel, width, order), orders)
    return _sealed(Header(encoding, order, numel, width, indices.size, fingerprint, 0), payload)


def with_delta_checksum(block: Block, checksum: int) -> bytes:
    """The block with another checksum of its delta.

    Raises:
        FormatError: If the block is damaged.
    """
    return _sealed(read_header(block)._replace(delta_checksum=checksum), block[_HEADER.size :])


def _sealed(header: Header, payload: Block) -> bytes:
    head = _HEADER.pack(MAGIC, VERSION, *header, 0)[: -_CHECKSUM.size]
    return head + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unchecked_header(block: Block) -> Header:
    """What the first `HEADER_SIZE` bytes of a block claim."""
    return Header(*_HEADER.unpack_from(block)[2:-1])


def read_header(block: Block) -> Header:
    """Check a block's header and checksum.

    Raises:
        FormatError: If the block is too short, of another kind or version, or changed.
    """
    if len(block) < _HEADER.size:
        raise FormatError(f"A child index block has at least {_HEADER.size} bytes, got {len(block)}.")
    magic, version, *fields, checksum = _HEADER.unpack_from(block)
    if magic == bytes(4):
        raise FormatError("The child index block is empty: it was allocated, but no adapter file was loaded into it.")
    if magic != MAGIC:
        raise FormatError(f"A child index block starts with {MAGIC!r}, got {magic!r}.")
    if version != VERSION:
        raise FormatError(f"This version of peft_child reads child index blocks of version {VERSION}, got {version}.")
    head = bytes(block[: _HEADER.size - _CHECKSUM.size])  # byte 7 of it is padding, which has to be 0
    if zlib.crc32(block[_HEADER.size :], zlib.crc32(head)) != checksum or head[7]:
        raise FormatError("The checksum of the child index block does not match its content.")
    header = Header(*fields)
    if header.encoding not in (BITMAP, GAPS, ALL, CHANNELS) or header.order not in (ROWS, COLUMNS):
        raise FormatError(f"Unknown encoding {header.encoding} or order {header.order} of a child index block.")
    if not 1 <= header.size <= header.numel < 1 << 63:  # positions are signed 64-bit integers
        raise FormatError(
            f"A child index block holds from 1 to {header.numel} positions; its header says {header.size}."
        )
    if not 1 <= header.width <= header.numel or header.numel % header.width:
        raise FormatError(f"A tensor of {header.numel} entries has no rows of {header.width}.")
    return header


def decode(block: Block) -> Indices:
    """Read the positions of a block.

    Memory and time are bounded by the tensor size that the header claims, so first compare it with the real one.

    Returns:
        Row-major positions, int64, shape `(size,)`, strictly increasing.

    Raises:
        FormatError: If the block is not what `encode` writes.
    """
    layout, found = decode_index(block)
    return found if layout is None else layout.positions(torch.from_numpy(found)).numpy()


def decode_index(block: Block) -> tuple[ChannelLayout | None, Indices]:
    """Read a block as it is written: the layout and the numbers of its channels, or None and its positions.

    Raises:
        FormatError: If the block is not what `encode` writes.
    """
    header = read_header(block)
    payload = block[_HEADER.size :]
    if header.encoding == CHANNELS:
        return _read_channels(payload, header)
    indices = {BITMAP: _read_bitmap, GAPS: _read_gaps, ALL: _read_all}[header.encoding](payload, header)
    if indices.size != header.size:
        raise FormatError(f"A child index block says {header.size} positions and holds {indices.size}.")
    _check_indices(indices, header.numel, FormatError)
    return None, indices


def _check_indices(indices: Indices, numel: int, error: type[ValueError]) -> None:
    if not indices.size:
        raise error("A child index block holds at least one position, got none.")
    if indices[0] < 0 or indices[-1] >= numel:
        raise error(f"Positions must lie in [0, {numel}), got {indices[0]} to {indices[-1]}.")
    falls = np.flatnonzero(indices[1:] <= indices[:-1])
    if falls.size:
        at = int(falls[0])
        raise error(f"Positions must be strictly increasing; entry {at + 1} is {indices[at + 1]} after {indices[at]}.")


def _compressed(write: Callable[[int], bytes], orders: list[int]) -> tuple[int, bytes]:
    """Choose the order and the compression that are best for the first `_PROBE` bytes; return order and payload.

    Random child networks repeat nothing: there a search for repetitions is slow, and Huffman coding alone is smaller.
    """
    written = {order: write(order) for order in orders}
    quick = {order: len(_compress(data[:_PROBE], 1)) for order, data in written.items()}
    order = min(quick, key=lambda order: quick[order])
    data = written[order]
    if len(_compress(data[:_PROBE], 1, zlib.Z_HUFFMAN_ONLY)) <= quick[order]:
        return order, _compress(data, 1, zlib.Z_HUFFMAN_ONLY)
    return order, _compress(data, 6)


def _compress(data: bytes, level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)  # 9: most memory, most speed
    return stream.compress(data) + stream.flush()


# Bitmaps


def _write_bitmap(indices: Indices, numel: int, width: int, order: int) -> bytes:
    bits = np.zeros(numel, dtype=np.bool_)
    bits[indices] = True
    if order == COLUMNS:
        bits = _transposed(bits, width)
    return np.packbits(bits, bitorder="little").tobytes()


def _read_bitmap(payload: Block, header: Header) -> Indices:
    packed = np.frombuffer(_decompress(payload, (header.numel + 7) // 8), dtype=np.uint8)
    if header.numel % 8 and packed[-1] >> header.numel % 8:
        raise FormatError(f"The bitmap of a child index block has positions beyond {header.numel}.")
    bits = np.unpackbits(packed, count=header.numel, bitorder="little").view(np.bool_)
    if header.order == COLUMNS:
        bits = _transposed(bits, header.numel // header.width)
    return np.flatnonzero(bits)


def _transposed(bits: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """A matrix with rows of `width`, flat, read column by column; torch does that ten times as fast as numpy."""
    transposed: npt.NDArray[np.bool_] = torch.from_numpy(bits).view(-1, width).t().reshape(-1).numpy()
    return transposed


# Gaps


def _write_gaps(indices: Indices, numel: int, width: int, order: int) -> bytes:
    # The order of columns as docs/format.md defines it, increasing again.
    positions = np.sort(indices % width * (numel // width) + indices // width) if order == COLUMNS else indices
    return _gap_planes(positions)


def _gap_planes(numbers: Indices) -> bytes:
    """The gaps less one between increasing numbers: the lowest bytes of all, then the second ones, and so on.

    High bytes are mostly zero, and side by side they compress to almost nothing.
    """
    gaps = np.diff(numbers, prepend=-1) - 1
    length = max(1, (int(gaps.max()).bit_length() + 7) // 8)
    planes = gaps.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :length]
    return np.ascontiguousarray(planes.T).tobytes()


def _read_gaps(payload: Block, header: Header) -> Indices:
    # How many bytes a gap takes is not stored; it follows from the length that the stream expands to.
    positions = _from_gap_planes(_decompress(payload, 8 * header.size, exact=False), header.size, header.numel)
    if header.order == COLUMNS:
        height = header.numel // header.width
        _check_indices(positions, header.numel, FormatError)  # before sorting, which would hide positions out of range
        positions = np.sort(positions % height * header.width + positions // height)
    return positions


def _from_gap_planes(data: bytes, count: int, limit: int) -> Indices:
    """What `_gap_planes` wrote: `count` numbers, each gap below `limit`; the numbers themselves are not checked."""
    length = len(data) // count
    if not length or length > 8 or length * count != len(data):
        raise FormatError(f"Gaps of {count} positions take 1 to 8 bytes each, got {len(data)} bytes in all.")
    planes = np.zeros((count, 8), dtype=np.uint8)
    planes[:, :length] = np.frombuffer(data, dtype=np.uint8).reshape(length, count).T
    gaps = planes.view("<u8").reshape(-1)
    if gaps.max() >= limit:  # so that the sum below cannot overflow unnoticed
        raise FormatError(f"A gap of a child index block must be less than {limit}, got {gaps.max()}.")
    return np.cumsum(gaps.astype(np.int64) + 1) - 1


# Channels


def decode_channels(block: Block) -> tuple[ChannelLayout, Indices] | None:
    """The layout and the numbers of the channels in a block; None if it is not written as channels.

    Raises:
        FormatError: If the block is not what `encode` writes.
    """
    header = read_header(block)
    return _read_channels(block[_HEADER.size :], header) if header.encoding == CHANNELS else None


def _read_channels(payload: Block, header: Header) -> tuple[ChannelLayout, Indices]:
    data = _decompress(payload, _LAYOUT.size + 8 * header.size, exact=False)
    if len(data) < _LAYOUT.size:
        raise FormatError(f"A list of channels starts with {_LAYOUT.size} bytes of layout, got {len(data)}.")
    layout = ChannelLayout(*_LAYOUT.unpack_from(data))
    if layout.numel != header.numel:  # also if a field is 0
        raise FormatError(f"Channels of the layout {tuple(layout)} do not fit a tensor of {header.numel} entries.")
    count, left = divmod(header.size, layout.size)
    if left or header.order != ROWS:
        raise FormatError(
            f"A list of channels is in the order of rows, and holds whole channels of {layout.size} entries; got "
            f"{header.size} positions in order {header.order}."
        )
    chosen = _from_gap_planes(data[_LAYOUT.size :], count, layout.number)
    _check_indices(chosen, layout.number, FormatError)
    return layout, chosen


def _read_all(payload: Block, header: Header) -> Indices:
    if len(payload) or header.size != header.numel or header.order != ROWS:
        raise FormatError(
            f"A child index block of all positions has no payload, order {ROWS} and size {header.numel}; "
            f"got {len(payload)} bytes, order {header.order} and size {header.size}."
        )
    return np.arange(header.numel, dtype=np.int64)


def _decompress(payload: Block, size: int, exact: bool = True) -> bytes:
    """Expand a payload to at most, or exactly, `size` bytes; refuses a longer one before expanding all of it."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(payload, size + 1)  # one byte too many shows that it is longer
    except zlib.error as error:
        raise FormatError(f"The payload of a child index block cannot be decompressed: {error}.") from error
    if len(data) > size or (exact and len(data) != size) or not stream.eof or stream.unused_data:
        limit = "exactly" if exact else "at most"
        raise FormatError(f"The payload of a child index block does not expand to {limit} {size} bytes.")
    return data
