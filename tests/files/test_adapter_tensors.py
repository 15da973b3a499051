"""The format as docs/format.md describes it: a reader from the page alone, and a file that must never change."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.files.adapter_tensors import fingerprint_of
from peft_child.tensors.codec import read_header
from peft_child.tensors.delta import SparseDelta

from ..helpers import chosen_model, move


GOLDEN = Path(__file__).parents[1] / "golden"


# The independent reader: nothing but numpy, safetensors, and the page.


def read_independently(path):
    """Flat indices and values by parameter name."""
    tensors = load_file(path)
    adapter = {}
    for key, block in tensors.items():
        module, kind, parameter = key.rpartition(".child_index.")
        if not kind:
            continue
        values = tensors[f"{module}.child_delta.{parameter}"]
        name = f"{module}.{parameter}".removeprefix("base_model.model.").replace(".base_layer.", ".")
        indices = read_block(name, block.tobytes(), values)
        adapter[name] = indices, values
    return adapter


def read_block(name, block, values):
    magic, version, encoding, order, zero, numel, width, size, _, delta_crc, crc = struct.unpack_from(
        "<4sBBBBQQQIII", block
    )
    payload = block[44:]
    assert (magic, version, zero) == (b"PCHI", 1, 0), name
    assert crc == zlib.crc32(block[:40] + payload), name
    assert delta_crc in (0, zlib.crc32(values.tobytes()) or 1), name
    assert values.size == size, name
    if encoding == 3:
        assert (payload, size, order) == (b"", numel, 0), name
        return np.arange(numel)
    data = np.frombuffer(zlib.decompress(payload), np.uint8)
    if encoding == 4:
        groups, outer, per_group, inner = struct.unpack_from("<4Q", data)
        planes = data[32:].reshape(-1, size // (outer * inner)).T.astype(np.int64)
        channels = np.cumsum((planes * 256 ** np.arange(planes.shape[1])).sum(1) + 1) - 1
        chosen = np.isin(np.arange(groups * per_group), channels).reshape(groups, 1, per_group, 1)
        return np.flatnonzero(np.broadcast_to(chosen, (groups, outer, per_group, inner)))
    if encoding == 1:
        positions = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    else:
        weights = 256 ** np.arange(data.size // size, dtype=np.int64)
        gaps = (data.reshape(-1, size).T * weights).sum(1)
        positions = np.cumsum(gaps + 1) - 1
    if order == 1:
        height = numel // width
        positions = np.sort(positions % height * width + positions // height)
    assert positions.size == size, name
    assert positions[-1] < numel, name
    return positions


def golden_adapter():
    """Every encoding and order, and what a file may hold besides."""
    random = torch.Generator().manual_seed(0)

    def in_columns(share, rows, columns):
        """Children that live in some columns."""
        chance = torch.where(torch.rand(columns, generator=random) < share, 0.5, 0.002)
        return (torch.rand(rows, columns, generator=random) < chance).flatten().nonzero().flatten(), (rows, columns)

    positions = {
        "model.gaps.weight": (torch.tensor([0, 300, 70_000, 99_999]), (100, 1000)),
        "model.gaps_in_columns.weight": in_columns(0.04, 120, 90),
        "model.bitmap.weight": ((torch.arange(1200) % 37 < 12).nonzero().flatten(), (40, 30)),
        "model.bitmap_in_columns.weight": in_columns(0.4, 120, 90),
        "model.bitmap.bias": (torch.tensor([0, 2, 3]), (7, 1)),
    }
    deltas = {
        name: SparseDelta(shape, indices, torch.arange(len(indices)).float() / 8 - 0.25, 1000 + number)
        for number, (name, (indices, shape)) in enumerate(positions.items())
    }
    settings = {"peft_type": "PEFT_CHILD", "density": 0.1, "variant": "extracted"}
    return SparseAdapter(settings, deltas, {"base_model.model.head.weight": torch.ones(2, 2)})


def assert_reads_as(read, deltas):
    assert read.keys() == deltas.keys()
    for name, (indices, values) in read.items():
        assert np.array_equal(indices, deltas[name].indices.numpy())
        assert np.array_equal(values, deltas[name].values.numpy())


@pytest.mark.smoke
def test_the_golden_file_is_read_as_ever():
    expected = golden_adapter()
    found = read_adapter(GOLDEN)
    assert {name: delta.fingerprint for name, delta in found.deltas.items()} == {
        name: delta.fingerprint for name, delta in expected.deltas.items()
    }
    assert torch.equal(found.dense["base_model.model.head.weight"], torch.ones(2, 2))
    assert_reads_as(
        {name: (delta.indices.numpy(), delta.values.numpy()) for name, delta in found.deltas.items()}, expected.deltas
    )
    assert_reads_as(read_independently(GOLDEN / "adapter_model.safetensors"), expected.deltas)
    tensors = load_file(GOLDEN / "adapter_model.safetensors")
    headers = [read_header(block.data) for key, block in tensors.items() if "child_index" in key]
    assert {(header.encoding, header.order) for header in headers} == {(1, 0), (1, 1), (2, 0), (2, 1)}


@pytest.mark.smoke
def test_what_is_written_is_what_the_golden_file_says(tmp_path):
    """Bytes depend on the version of zlib, headers and content do not."""
    write_adapter(tmp_path / "again", golden_adapter())
    read = [load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN, tmp_path / "again")]
    assert read[0].keys() == read[1].keys()
    for key, block in read[0].items():
        if "child_index" in key:
            assert block[:40].tobytes() == read[1][key][:40].tobytes()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["task_driven", "random"])
def test_the_independent_reader_agrees_with_the_library(tmp_path, density, variant, granularity):
    model = chosen_model("bert_container", density=density, variant=variant)
    move(model)
    model.save_pretrained(tmp_path)
    assert_reads_as(read_independently(tmp_path / "adapter_model.safetensors"), read_adapter(tmp_path).deltas)


def test_the_fingerprint_is_as_described():
    base = torch.tensor([1.0, -2.5, 3.14159, 1e-8])
    rounded = np.array([1.0, 3.140625, 1e-8], dtype=np.float32)
    halves = (base[[0, 2, 3]].bfloat16().view(torch.int16)).numpy()
    assert abs(base[[0, 2, 3]].bfloat16().float().numpy() - rounded).max() < 1e-2
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint_of(base.to(dtype), torch.tensor([0, 2, 3])) == zlib.crc32(halves.astype("<i2").tobytes())
    assert fingerprint_of(base.half(), torch.tensor([0])) == 0
