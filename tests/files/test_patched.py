"""A checkpoint with other values at some entries, as a serving engine holds it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_child.files.adapter_folder import SparseAdapter, read_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import NamesDifferError, merge_checkpoint
from peft_child.files.patch import Patch, TensorPatch, export_patch, open_patch
from peft_child.files.patched import PatchedCheckpoint, overlaid

from ..helpers import assert_same
from .test_operations import bits, saved_adapter, saved_base, tensors_of


def written(tensors, writes):
    """What an engine does with writes."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, patches in writes.items():
        for patch in patches:
            tensors[name].view(-1)[patch.indices] = patch.values
    return tensors


@pytest.fixture
def folder(tmp_path):
    base = saved_base(tmp_path / "base", torch.bfloat16)
    for number, settings in enumerate([{}, {"variant": "random", "seed": 3}]):
        saved_adapter(base, tmp_path / f"child{number}", **settings)
        merge_checkpoint(read_adapter(tmp_path / f"child{number}"), Checkpoint(base), tmp_path / f"merged{number}")
    return tmp_path


def test_the_ways_between_base_and_adapters(folder):
    state, held = PatchedCheckpoint(Checkpoint(folder / "base")), tensors_of(folder / "base")
    for there in ("0", "1", "1", "base", "1", "0", "base"):
        adapter = None if there == "base" else read_adapter(folder / f"child{there}")
        state.changed, writes = state.to_base() if adapter is None else state.to(adapter)
        held = written(held, writes)
        expected = tensors_of(folder / ("base" if adapter is None else f"merged{there}"))
        assert_same(bits(held), bits(expected))
        for name in expected:
            everywhere = torch.arange(expected[name].numel(), dtype=torch.int32)
            assert torch.equal(state.values_at(name, everywhere), expected[name].reshape(-1))
    assert state.to_base() == ({}, {})


def test_patches_are_applied_on_top(folder):
    state = PatchedCheckpoint(Checkpoint(folder / "base"))
    first, second = (folder / f"{number}.safetensors" for number in "01")
    export_patch(read_adapter(folder / "child0"), Checkpoint(folder / "base"), first)
    # From one merged checkpoint on, another adapter: its patch fits the state after the first patch, and only that.
    with pytest.warns(UserWarning, match="not those that the adapter was made on"):
        export_patch(read_adapter(folder / "child1"), Checkpoint(folder / "merged0"), second)
    with pytest.raises(ValueError, match="was made to replace other values of 'model"):
        state.to(open_patch(second))
    held = tensors_of(folder / "base")
    for file in (first, second):
        state.changed, writes = state.to(open_patch(file))
        held = written(held, writes)
    expected = tensors_of(folder / "merged0")
    for name, patch in open_patch(second).tensors.items():
        expected[name].view(-1)[patch.indices] = patch.values
    assert_same(bits(held), bits(expected))
    assert_same(bits(written(held, state.to_base().writes)), bits(tensors_of(folder / "base")))


def test_what_does_not_fit_is_refused(folder, tmp_path):
    state = PatchedCheckpoint(Checkpoint(folder / "base"))
    adapter = read_adapter(folder / "child0")
    other = PatchedCheckpoint(Checkpoint(folder / "merged0"))
    with pytest.raises(ValueError, match="are not those that the adapter was made on"):
        other.to(adapter)
    with pytest.raises(NamesDifferError, match=r"has no tensor 'x\.weight'"):
        state.to(SparseAdapter({}, {}, {"base_model.model.x.weight": torch.ones(1)}))
    name = next(iter(adapter.deltas))
    position, value = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16)
    shape = state.base.places[name].shape
    for where, patch, problem in [
        ("x", TensorPatch(shape, position, value), "changes 'x', which .* does not have"),
        (name, TensorPatch((1, *shape), position, value), "export the patch for this checkpoint"),
        (name, TensorPatch(shape, position, value.float()), r"but .* and torch\.float32 in the patch"),
        (name, TensorPatch(shape, position, value, before=3), "was made to replace other values"),
    ]:
        with pytest.raises(ValueError, match=problem):
            state.to(Patch({where: patch}))
    assert state.changed == {}


def test_a_module_saved_whole_is_a_patch_of_all_its_entries(tmp_path):
    save_file({"head.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    state = PatchedCheckpoint(Checkpoint(tmp_path))
    whole = torch.arange(6.0).view(2, 3)
    writes = state.to(SparseAdapter({}, {}, {"base_model.model.head.weight": whole})).writes
    assert torch.equal(written({"head.weight": torch.zeros(2, 3)}, writes)["head.weight"], whole)


def test_after_half_a_change_every_way_leads_over_all_of_its_entries(folder):
    state, held = PatchedCheckpoint(Checkpoint(folder / "base")), tensors_of(folder / "base")
    state.changed, writes = state.to(read_adapter(folder / "child0"))
    held = written(held, writes)
    change = state.to(read_adapter(folder / "child1"))
    half = dict(list(change.writes.items())[: len(change.writes) // 2])
    held = written(held, half)
    state.mark_torn(change)
    for adapter, name in ((None, "base"), (read_adapter(folder / "child0"), "merged0")):
        writes = (state.to_base() if adapter is None else state.to(adapter)).writes
        assert_same(bits(written(held, writes)), bits(tensors_of(folder / name)))


positions = st.sets(st.integers(0, 30), min_size=1).map(sorted)


@given(positions, positions)
def test_the_second_patch_is_laid_over_the_first(first, second):
    parts = [
        TensorPatch(
            (31,),
            torch.tensor(chosen, dtype=torch.int32),
            torch.full((len(chosen),), float(number)),
            replaced=torch.tensor(chosen) * 3.0,
        )
        for number, chosen in enumerate((first, second), start=1)
    ]
    both = overlaid(*parts)
    slow = {**dict.fromkeys(first, 1.0), **dict.fromkeys(second, 2.0)}
    assert dict(zip(both.indices.tolist(), both.values.tolist(), strict=True)) == slow
    assert both.indices.tolist() == sorted(slow)
    assert torch.equal(both.replaced, both.indices * 3.0)
    assert overlaid(None, parts[0]) is parts[0]
