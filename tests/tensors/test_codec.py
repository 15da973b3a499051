import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_child.tensors import codec
from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.codec import FormatError, decode, decode_channels, encode, read_header, with_delta_checksum


def random_indices(numel, count, seed=0):
    return np.sort(np.random.default_rng(seed).choice(numel, count, replace=False)).astype(np.int64)


@given(st.lists(st.integers(1, 9), max_size=4), st.data())
def test_round_trip(shape, data):
    numel = int(np.prod(shape, dtype=int))
    chosen = data.draw(st.sets(st.integers(0, numel - 1), min_size=1))
    indices = np.array(sorted(chosen), dtype=np.int64)
    block = encode(indices, tuple(shape), fingerprint=7)
    assert np.array_equal(decode(block), indices)
    header = read_header(block)
    assert (header.numel, header.size, header.fingerprint, header.delta_checksum) == (numel, len(indices), 7, 0)
    stamped = with_delta_checksum(block, 9)
    assert read_header(stamped) == header._replace(delta_checksum=9)
    assert np.array_equal(decode(stamped), indices)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_children_that_live_in_some_columns_are_written_in_the_order_of_columns(share):
    random = np.random.default_rng(0)
    mask = random.random((200, 300)) < np.where(random.random(300) < share, 0.5, 0.002)
    for wanted, tensor in ((codec.COLUMNS, mask), (codec.ROWS, np.ascontiguousarray(mask.T))):
        indices = np.flatnonzero(tensor)
        block = encode(indices, tensor.shape)
        assert read_header(block).order == wanted
        assert np.array_equal(decode(block), indices)


@pytest.mark.parametrize("count", [1, 100, 1000, 5000, 9999, 10_000])
def test_round_trip_at_every_density(count):
    indices = random_indices(10_000, count)
    assert np.array_equal(decode(encode(indices, (100, 100))), indices)


def test_positions_beyond_32_bits():
    indices = np.array([0, 5, 2**31, 2**33 + 1, 2**40], dtype=np.int64)
    assert np.array_equal(decode(encode(indices, (2**21, 2**20))), indices)


@pytest.mark.slow  # for what it imports
def test_same_bytes_in_another_process():
    code = (
        "import numpy as np, zlib; from peft_child.tensors.codec import encode;"
        "print(zlib.crc32(encode(np.arange(0, 9000, 7), (90, 100))))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == zlib.crc32(encode(np.arange(0, 9000, 7), (90, 100)))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.08, 0.085, 0.1, 0.2, 0.3])
def test_random_positions_take_little_more_than_their_entropy(density):
    numel = 1_000_000
    indices = random_indices(numel, int(density * numel))
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * numel / 8
    assert len(encode(indices, (1000, 1000))) < 1.25 * entropy


@pytest.mark.parametrize(
    ("indices", "numel", "message"),
    [
        ([], 5, "at least one position"),
        ([0, 5], 5, r"must lie in \[0, 5\), got 0 to 5"),
        ([-1, 2], 5, r"must lie in \[0, 5\), got -1 to 2"),
        ([0, 3, 2, 4], 5, "strictly increasing; entry 2 is 2 after 3"),
        ([1, 1], 5, "strictly increasing; entry 1 is 1 after 1"),
    ],
)
def test_only_sorted_positions_in_range_are_written(indices, numel, message):
    with pytest.raises(ValueError, match=message):
        encode(np.array(indices, dtype=np.int64), (numel,))


@pytest.mark.parametrize("count", [3, 400])
def test_every_changed_byte_is_noticed(count):
    block = encode(random_indices(1000, count), (25, 40))
    for position in range(len(block)):
        changed = bytearray(block)
        changed[position] ^= 1 << (position % 8)
        with pytest.raises(FormatError):
            decode(bytes(changed))


def test_truncated_and_extended_blocks_are_refused():
    block = encode(random_indices(1000, 50), (25, 40))
    for length in range(len(block)):
        with pytest.raises(FormatError):
            decode(block[:length])
    with pytest.raises(FormatError, match="checksum"):
        decode(block + b"\0")


def forge(encoding, numel, count, payload, order=codec.ROWS, width=1):
    """A block with a right checksum and any content."""
    return codec._sealed(codec.Header(encoding, order, numel, width, count, 0, 0), payload)


BITS = zlib.compress(bytes([0b1011]))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (forge(codec.BITMAP, 8, 2, BITS), "says 2 positions and holds 3"),
        (forge(codec.BITMAP, 3, 3, BITS), "positions beyond 3"),
        (forge(codec.BITMAP, 8, 9, BITS), "from 1 to 8 positions; its header says 9"),
        (forge(codec.BITMAP, 8, 0, BITS), "from 1 to 8 positions; its header says 0"),
        (forge(codec.BITMAP, 2**63, 3, BITS), "from 1 to 9223372036854775808 positions"),
        (forge(codec.BITMAP, 2**60, 3, BITS), "exactly 144115188075855872 bytes"),
        (forge(codec.BITMAP, 8, 3, zlib.compress(bytes(10_000_000))), "exactly 1 bytes"),
        (forge(codec.BITMAP, 8, 3, BITS + b"more"), "exactly 1 bytes"),
        (forge(codec.BITMAP, 8, 3, BITS[:-1]), "exactly 1 bytes"),
        (forge(codec.BITMAP, 8, 3, b"no zlib"), "cannot be decompressed"),
        (forge(7, 8, 3, BITS), "Unknown encoding 7 or order 0"),
        (forge(codec.BITMAP, 8, 3, BITS, order=2), "Unknown encoding 1 or order 2"),
        (forge(codec.BITMAP, 8, 3, BITS, width=3), "A tensor of 8 entries has no rows of 3"),
        (forge(codec.BITMAP, 8, 3, BITS, width=0), "A tensor of 8 entries has no rows of 0"),
        (forge(codec.GAPS, 8, 3, zlib.compress(bytes(25))), "at most 24 bytes"),
        (forge(codec.GAPS, 8, 3, zlib.compress(bytes(4))), "1 to 8 bytes each, got 4 bytes in all"),
        (forge(codec.GAPS, 8, 3, zlib.compress(b"")), "1 to 8 bytes each, got 0 bytes in all"),
        (forge(codec.GAPS, 8, 2, zlib.compress(bytes([3, 200]))), "must be less than 8, got 200"),
        (forge(codec.GAPS, 8, 2, zlib.compress(bytes([3, 6]))), "must lie in"),
        (forge(codec.GAPS, 8, 2, zlib.compress(bytes([3, 6])), order=codec.COLUMNS, width=2), "must lie in"),
        (forge(codec.ALL, 8, 7, b""), "all positions has no payload.* got 0 bytes, order 0 and size 7"),
        (forge(codec.ALL, 8, 8, b"", order=codec.COLUMNS), "all positions has no payload"),
        (forge(codec.ALL, 8, 8, BITS), "all positions has no payload"),
        (forge(codec.GAPS, 2**62, 2, zlib.compress(bytes([255] * 16))), "must be less than 4611686018427387904"),
    ],
)
def test_liars_are_refused(block, message):
    with pytest.raises(FormatError, match=message):
        decode(block)


def test_an_honest_forgery_is_read():
    assert decode(forge(codec.BITMAP, 8, 3, BITS)).tolist() == [0, 1, 3]
    assert decode(forge(codec.BITMAP, 8, 3, BITS, order=codec.COLUMNS, width=2)).tolist() == [0, 2, 6]
    gaps = zlib.compress(bytes([0, 0, 1]))
    assert decode(forge(codec.GAPS, 8, 3, gaps)).tolist() == [0, 1, 3]
    assert decode(forge(codec.GAPS, 8, 3, gaps, order=codec.COLUMNS, width=2)).tolist() == [0, 2, 6]


def test_a_block_that_was_never_loaded_says_so():
    with pytest.raises(FormatError, match="allocated, but no adapter file was loaded"):
        decode(bytes(64))


# Channels


LAYOUTS = [
    ChannelLayout(1, 40, 30, 1),
    ChannelLayout(1, 1, 50, 16),
    ChannelLayout(1, 6, 9, 4),
    ChannelLayout(3, 5, 8, 1),
    ChannelLayout(1, 1, 1, 8),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_come_back_as_numbers_and_as_positions(layout):
    chosen = list(range(layout.number))[:: 2 if layout.number > 1 else 1]
    positions = layout.positions(torch.tensor(chosen)).numpy()
    shape = (layout.groups * layout.outer, layout.numel // (layout.groups * layout.outer))
    block = encode(positions, shape, 7, layout)
    found, numbers = decode_channels(block)
    assert (found, numbers.tolist()) == (layout, chosen)
    assert np.array_equal(decode(block), positions)
    assert read_header(block).encoding == codec.CHANNELS
    assert block == encode(decode(block), shape, 7, layout)


def test_a_list_of_channels_takes_next_to_nothing():
    layout = ChannelLayout(1, 768, 768, 1)
    positions = layout.positions(torch.arange(0, 768, 10)).numpy()
    block = encode(positions, (768, 768), 0, layout)
    assert len(block) <= 0.01 * len(positions)
    assert decode_channels(encode(positions, (768, 768))) is None  # unless it is asked for, channels are entries


def test_channels_that_are_cut_are_not_written():
    with pytest.raises(ValueError, match="must hold whole channels"):
        encode(np.array([0, 1, 5]), (4, 5), 0, ChannelLayout(1, 4, 5, 1))


def forged_channels(layout, data, size=8, numel=20, order=0):
    payload = zlib.compress(struct.pack("<QQQQ", *layout) + data)
    return codec._sealed(codec.Header(codec.CHANNELS, order, numel, 5, size, 0, 0), payload)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (forged_channels((1, 4, 5, 1), bytes([0, 5])), "must be less than 5, got 5"),
        (forged_channels((1, 4, 5, 1), bytes([4, 0])), r"must lie in \[0, 5\), got 4 to 5"),
        (forged_channels((1, 4, 5, 1), bytes([0])), "Gaps of 2 positions take 1 to 8 bytes each, got 1 bytes"),
        (forged_channels((1, 4, 5, 1), bytes(3)), "Gaps of 2 positions take 1 to 8 bytes each, got 3 bytes"),
        (forged_channels((1, 4, 5, 1), bytes(18)), "Gaps of 2 positions take 1 to 8 bytes each, got 18 bytes"),
        (forged_channels((1, 4, 5, 1), bytes(2), size=7), "whole channels of 4 entries; got 7 positions in order 0"),
        (
            forged_channels((1, 4, 5, 1), bytes(2), order=1),
            "whole channels of 4 entries; got 8 positions in order 1",
        ),
        (forged_channels((1, 4, 6, 1), bytes(2)), r"layout \(1, 4, 6, 1\) do not fit a tensor of 20"),
        (forged_channels((0, 4, 5, 1), bytes(2)), "do not fit a tensor of 20"),
        (forged_channels((1, 2**63, 5, 2), bytes(2)), "do not fit a tensor of 20"),
        (codec._sealed(codec.Header(4, 0, 20, 5, 8, 0, 0), zlib.compress(bytes(9))), "starts with 32 bytes of layout"),
        (codec._sealed(codec.Header(4, 0, 20, 5, 8, 0, 0), zlib.compress(bytes(10**6))), "does not expand to at most"),
    ],
)
def test_lists_of_channels_that_lie_are_refused(block, message):
    for read in (decode, decode_channels):
        with pytest.raises(FormatError, match=message):
            read(block)
