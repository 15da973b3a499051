"""Patch files: what a merge changes, and the way back."""

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from peft_child import FormatError
from peft_child.files.adapter_folder import read_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import METADATA_KEY, Patch, TensorPatch, export_patch, open_patch, write_patch

from ..helpers import assert_same
from .test_operations import bits, saved_adapter, saved_base, tensors_of


GOLDEN = Path(__file__).parents[1] / "golden" / "patch.safetensors"


def golden_patch():
    """Values that a float and a bfloat16 have exactly, in one tensor of each."""
    narrow = TensorPatch((2, 3), torch.tensor([0, 4], dtype=torch.int32), torch.tensor([1.5, -2.0]), before=7)
    half = torch.tensor([0.25], dtype=torch.bfloat16)
    return Patch(
        {"a.weight": narrow, "b.bias": TensorPatch((3,), torch.tensor([2], dtype=torch.int32), half)},
        {"adapter": "me/child", "base_model": "org/base", "undo": False},
    )


def patched_by_numpy(file, base):
    """The checkpoint after a patch, by a reader that knows only numpy, zlib and what docs/format.md says."""
    with Path(file).open("rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    about = json.loads(header["__metadata__"]["peft_child_patch"])
    assert about["version"] == 1
    patch, arrays = load_arrays(file), load_arrays(base)
    assert patch.keys() == {f"{name}.{kind}" for name in about["tensors"] for kind in ("indices", "values")}
    for name, described in about["tensors"].items():
        indices, values = patch[f"{name}.indices"], patch[f"{name}.values"]
        assert list(arrays[name].shape) == described["shape"]
        assert indices.dtype == np.int32
        assert (np.diff(indices) > 0).all()
        flat = arrays[name].reshape(-1)
        assert (zlib.crc32(flat[indices].tobytes()) or 1) == described["before"]
        assert (zlib.crc32(values.tobytes()) or 1) == described["after"]
        flat[indices] = values
    return arrays


@pytest.mark.filterwarnings("ignore:Gradients of float16 weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_patch_gives_the_merged_checkpoint_and_its_undo_the_base(tmp_path, granularity, dtype):
    base = saved_base(tmp_path / "base", dtype)
    saved_adapter(base, tmp_path / "child", granularity=granularity)
    adapter, undo = read_adapter(tmp_path / "child"), tmp_path / "undo.safetensors"
    export_patch(adapter, Checkpoint(base), tmp_path / "patch.safetensors", undo=undo, source="me/child")
    merge_checkpoint(adapter, Checkpoint(base), tmp_path / "merged")
    merged, original = (load_arrays(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    there = patched_by_numpy(tmp_path / "patch.safetensors", base / "model.safetensors")
    back = patched_by_numpy(undo, tmp_path / "merged/model.safetensors")
    for name in original:
        assert there[name].tobytes() == merged[name].tobytes()
        assert back[name].tobytes() == original[name].tobytes()
    origins = [open_patch(tmp_path / "patch.safetensors").origin, open_patch(undo).origin]
    expected = {"adapter": "me/child", "base_model": str(base)}
    assert origins == [{**expected, "undo": False}, {**expected, "undo": True}]


def test_bfloat16_values_are_those_of_the_merged_checkpoint(tmp_path):
    base = saved_base(tmp_path / "base", torch.bfloat16)
    saved_adapter(base, tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    export_patch(adapter, Checkpoint(base), tmp_path / "patch.safetensors")
    merge_checkpoint(adapter, Checkpoint(base), tmp_path / "merged")
    tensors = {name: tensor.clone() for name, tensor in tensors_of(base).items()}
    patch = open_patch(tmp_path / "patch.safetensors")
    assert patch.tensors.keys() == adapter.deltas.keys()
    for name in patch.tensors:
        part = patch.tensors[name]
        assert part.shape == tensors[name].shape
        tensors[name].view(-1)[part.indices] = part.values
    assert_same(bits(tensors), bits(tensors_of(tmp_path / "merged")))


def test_the_golden_file_is_read_and_written_as_ever(tmp_path):
    expected, found = golden_patch(), open_patch(GOLDEN)
    assert found.origin == expected.origin
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        ours, theirs = expected.tensors[name], found.tensors[name]
        assert (ours.shape, ours.before, ours.values.dtype) == (theirs.shape, theirs.before, theirs.values.dtype)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.values, theirs.values)
    write_patch(tmp_path / "again.safetensors", expected)
    assert (tmp_path / "again.safetensors").read_bytes() == GOLDEN.read_bytes()


def changed(file, tensors, metadata):
    """The golden file with other tensors or another description."""
    with safe_open(GOLDEN, framework="pt") as golden:
        described = json.loads(golden.metadata()[METADATA_KEY])
    save_file({**load_file(GOLDEN), **tensors}, file, {METADATA_KEY: json.dumps({**described, **metadata})})
    return file


A = {"shape": [2, 3], "before": 7, "after": 0}
B = {"shape": [3], "before": 0, "after": 0}


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({}, {"version": 2}, "has version 2; this reader knows 1"),
        ({}, {"origin": 3}, "metadata of the patch .* are not valid"),
        ({}, {"tensors": [1]}, "metadata of the patch .* are not valid"),
        ({}, {"tensors": {"a.weight": {**A, "shape": [-1]}, "b.bias": B}}, "not a count: -1"),
        ({}, {"tensors": {"a.weight": {**A, "shape": [True]}, "b.bias": B}}, "not a count: True"),
        ({}, {"tensors": {"a.weight": {**A, "before": 1.0}, "b.bias": B}}, "not a count: 1.0"),
        ({}, {"tensors": {"a.weight": {**A, "shape": [1 << 62] * 65}, "b.bias": B}}, "more than 64 dimensions"),
        ({}, {"tensors": {"a.weight": {**A, "shape": [1 << 32] * 2}, "b.bias": B}}, "not a count"),
        ({}, {"tensors": {"a.weight": A}}, "must describe the tensors that it has; 'b.bias.indices' differs"),
        ({"c.values": torch.ones(2)}, {}, "must describe the tensors that it has; 'c.values' differs"),
        ({"a.weight.indices": torch.tensor([0, 6])}, {}, "increasing, between 0 and 5"),
        ({"a.weight.indices": torch.tensor([-1, 4])}, {}, "increasing, between 0 and 5"),
        ({"a.weight.indices": torch.tensor([4, 4])}, {}, "increasing, between 0 and 5"),
        ({"a.weight.indices": torch.tensor([0.0, 4.0])}, {}, r"its indices are torch\.float32"),
        ({"a.weight.indices": torch.tensor([[0], [4]])}, {}, r"its indices have the shape \(2, 1\)"),
        ({"a.weight.indices": torch.tensor([4])}, {}, r"its indices have the shape \(1,\) and its values \(2,\)"),
        ({"a.weight.values": torch.tensor([1, 2])}, {}, r"its values torch\.int64"),
        ({"a.weight.values": torch.tensor([1.0, torch.inf])}, {}, "a value is not finite"),
        ({"a.weight.values": torch.tensor([1.5, 2.0])}, {}, "the checksum of its values does not match"),
        ({"a.weight.values": torch.empty(0), "a.weight.indices": torch.empty(0, dtype=torch.int32)}, {}, "increasing"),
    ],
)
def test_a_wrong_patch_is_refused(tmp_path, tensors, metadata, problem):
    with pytest.raises(FormatError, match=problem):
        dict(open_patch(changed(tmp_path / "patch.safetensors", tensors, metadata)).tensors)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no patch file"):
        open_patch(tmp_path / "none")
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(FormatError, match=f"its metadata has no '{METADATA_KEY}'"):
        open_patch(tmp_path / "plain")
    for deep in ("[" * 100_000, '{"version": 1, "tensors": {}, "origin": ' + "[" * 100_000):
        save_file({"a": torch.ones(1)}, tmp_path / "deep", {METADATA_KEY: deep})
        with pytest.raises(FormatError, match="are not valid"):
            open_patch(tmp_path / "deep")
    with pytest.raises(ValueError, match="must be finite; some of 'x' are not"):
        write_patch(tmp_path / "new", Patch({"x": TensorPatch((1,), torch.zeros(1).int(), torch.tensor([torch.nan]))}))
    assert not (tmp_path / "new").exists()


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    file = tmp_path / "patch.safetensors"
    file.write_bytes(GOLDEN.read_bytes())
    read = dict(open_patch(file).tensors)
    with file.open("r+b") as data:  # in place, as `cp` writes
        data.seek(-20, 2)
        data.write(bytes(20))
    for name, part in golden_patch().tensors.items():
        assert torch.equal(read[name].values, part.values)
        assert torch.equal(read[name].indices, part.indices)


def test_damaged_patches_are_refused_or_the_same(tmp_path):
    rng, original, counts = random.Random(1), dict(open_patch(GOLDEN).tensors), {"refused": 0, "same": 0, "indices": 0}
    for _ in range(500):
        data = bytearray(GOLDEN.read_bytes())
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        (tmp_path / "damaged").write_bytes(data)
        try:
            found = dict(open_patch(tmp_path / "damaged").tensors)
        except FormatError:
            counts["refused"] += 1
            continue
        # Positions have no checksum of their own: a base that is patched elsewhere does not have the values `before`.
        same = found.keys() == original.keys() and all(
            torch.equal(found[name].values, original[name].values) for name in original
        )
        counts["same" if same else "indices"] += 1
    assert counts["refused"] > 300
    assert counts["indices"] < 20
