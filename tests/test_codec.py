import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_child import codec
from peft_child.codec import FormatError, decode, encode, read_header


def random_indices(numel, count, seed=0):
    return np.sort(np.random.default_rng(seed).choice(numel, count, replace=False)).astype(np.int64)


@given(st.integers(1, 300), st.data())
def test_round_trip(numel, data):
    chosen = data.draw(st.sets(st.integers(0, numel - 1), min_size=1))
    indices = np.array(sorted(chosen), dtype=np.int64)
    block = encode(indices, numel)
    assert np.array_equal(decode(block), indices)
    assert read_header(block)[1:] == (numel, len(indices))


@pytest.mark.parametrize("count", [1, 100, 1000, 5000, 9999, 10_000])
def test_round_trip_at_every_density(count):
    indices = random_indices(10_000, count)
    assert np.array_equal(decode(encode(indices, 10_000)), indices)


def test_positions_beyond_32_bits():
    indices = np.array([0, 5, 2**31, 2**33 + 1, 2**40], dtype=np.int64)
    assert np.array_equal(decode(encode(indices, 2**41)), indices)


def test_same_bytes_in_another_process():
    code = (
        "import numpy as np, zlib; from peft_child.codec import encode;"
        "print(zlib.crc32(encode(np.arange(0, 9000, 7), 9000)))"
    )
    import zlib

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == zlib.crc32(encode(np.arange(0, 9000, 7), 9000))


@pytest.mark.parametrize(
    ("density", "most"), [(0.001, 1.25 * 1.43), (0.01, 1.25 * 1.01), (0.1, 1.25 * 0.586), (0.3, 1.25 * 0.367)]
)
def test_random_positions_take_little_more_than_their_entropy(density, most):
    numel = 1_000_000
    indices = random_indices(numel, int(density * numel))
    assert len(encode(indices, numel)) / indices.size < most


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
        encode(np.array(indices, dtype=np.int64), numel)


@pytest.mark.parametrize("count", [3, 400])
def test_every_changed_byte_is_noticed(count):
    block = encode(random_indices(1000, count), 1000)
    for position in range(len(block)):
        changed = bytearray(block)
        changed[position] ^= 1 << (position % 8)
        with pytest.raises(FormatError):
            decode(bytes(changed))


def test_truncated_and_extended_blocks_are_refused():
    block = encode(random_indices(1000, 50), 1000)
    for length in range(len(block)):
        with pytest.raises(FormatError):
            decode(block[:length])
    with pytest.raises(FormatError, match="checksum"):
        decode(block + b"\0")


def forge(encoding, numel, count, payload):
    """A block with a right checksum and any content."""
    import zlib

    head = codec._HEADER.pack(codec.MAGIC, codec.VERSION, encoding, numel, count, 0)[: -codec._CHECKSUM.size]
    return head + codec._CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def test_liars_are_refused():
    import zlib

    bitmap = zlib.compress(bytes([0b1011]))
    assert decode(forge(codec.BITMAP, 8, 3, bitmap)).tolist() == [0, 1, 3]
    with pytest.raises(FormatError, match="says 2 positions and holds 3"):
        decode(forge(codec.BITMAP, 8, 2, bitmap))
    with pytest.raises(FormatError, match="positions beyond 3"):
        decode(forge(codec.BITMAP, 3, 3, bitmap))
    with pytest.raises(FormatError, match="from 1 to 8 positions, its header says 9"):
        decode(forge(codec.BITMAP, 8, 9, bitmap))
    with pytest.raises(FormatError, match="from 1 to 8 positions, its header says 0"):
        decode(forge(codec.BITMAP, 8, 0, bitmap))
    with pytest.raises(FormatError, match="exactly 1 bytes"):
        decode(forge(codec.BITMAP, 8, 3, zlib.compress(bytes(10_000_000))))
    with pytest.raises(FormatError, match="exactly 1 bytes"):
        decode(forge(codec.BITMAP, 8, 3, bitmap + b"more"))
    with pytest.raises(FormatError, match="cannot be decompressed"):
        decode(forge(codec.BITMAP, 8, 3, b"no zlib"))
    with pytest.raises(FormatError, match="Unknown encoding 7"):
        decode(forge(7, 8, 3, bitmap))
    with pytest.raises(FormatError, match="take from 1 to 8 bytes, got 9"):
        decode(forge(codec.GAPS, 8, 3, bytes([9]) + bitmap))
    with pytest.raises(FormatError, match="must lie in"):
        decode(forge(codec.GAPS, 8, 2, bytes([1]) + zlib.compress(bytes([3, 200]))))
    with pytest.raises(FormatError):
        decode(forge(codec.GAPS, 2**62, 2, bytes([8]) + zlib.compress(bytes([255] * 16))))


def test_a_block_that_was_never_loaded_says_so():
    with pytest.raises(FormatError, match="allocated, but no adapter file was loaded"):
        decode(bytes(64))
