"""Adapters of the difference between two checkpoints."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_child.files.adapter_folder import read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.extract import extract_adapter, extract_channels
from peft_child.files.merge import merge_checkpoint

from ..helpers import assert_same, logits
from ..problems import batch_of
from .test_operations import bits, saved_base, tensors_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_extracted_gives_the_tuned_checkpoint_back(tmp_path, dtype):
    base = saved_base(tmp_path / "base", dtype)
    tuned = load_file(base / "model.safetensors")
    for tensor in tuned.values():
        moved = torch.rand(tensor.shape) < 0.1
        tensor[moved] = (tensor[moved] * (1 + 0.1 * torch.randn(int(moved.sum())))).to(dtype)
    tuned["model.norm.weight"][:3] = torch.tensor([1.2345e-5, 0.0, -3.21e-4]).to(dtype)  # far from 1
    save_file(tuned, tmp_path / "tuned.safetensors", metadata={"format": "pt"})
    adapter = extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"))
    wide = adapter.deltas["model.norm.weight"].values.dtype
    assert wide == (torch.float64 if dtype == torch.float32 else torch.float32)
    write_adapter(tmp_path / "child", adapter)
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "merged")
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tuned))
    # and PEFT loads it
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "child", check_base="error"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model, batch_of("llama")), logits(merged, batch_of("llama")))
    assert_same(bits(model.merge_and_unload().state_dict()), bits(merged.state_dict()))


def test_extracting_at_a_density_takes_the_largest_changes(tmp_path):
    base = saved_base(tmp_path / "base")
    before = load_file(base / "model.safetensors")
    tuned = {name: tensor + torch.randn(tensor.shape) for name, tensor in before.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    adapter = extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), density=0.01)
    total = sum(tensor.numel() for tensor in before.values())
    assert sum(delta.indices.numel() for delta in adapter.deltas.values()) == round(0.01 * total)
    changes = torch.cat([(tuned[name] - before[name]).abs().flatten() for name in before])
    least = min(delta.values.abs().min() for delta in adapter.deltas.values())
    assert (changes > least).sum() < round(0.01 * total)


def test_extracting_channels_takes_those_that_moved_most(tmp_path):
    base = saved_base(tmp_path / "base")
    before = load_file(base / "model.safetensors")
    tuned = {
        name: tensor + torch.randn(tensor.shape) * torch.rand(tensor.shape[-1]) for name, tensor in before.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors", metadata={"format": "pt"})
    adapter = extract_channels(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), 0.1)
    total = sum(tensor.numel() for tensor in before.values())
    means = {}
    for name, tensor in before.items():
        squares = (tuned[name] - tensor).square()
        by_channel = squares.mean(1) if "embed" in name else squares.mean(0) if tensor.dim() > 1 else squares
        means |= {(name, number): float(value) for number, value in enumerate(by_channel)}
    chosen = {
        (name, int(number)) for name, delta in adapter.deltas.items() for number in delta.layout.holding(delta.indices)
    }
    assert min(means[key] for key in chosen) >= max(means[key] for key in means.keys() - chosen)
    size = sum(delta.indices.numel() for delta in adapter.deltas.values())
    assert 0.09 * total < size <= round(0.1 * total)
    write_adapter(tmp_path / "child", adapter)
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    for name, delta in adapter.deltas.items():
        expected = before[name].flatten()
        expected[delta.indices] = tuned[name].flatten()[delta.indices]
        torch.testing.assert_close(merged[name].flatten(), expected)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "child")
    assert model.peft_config["default"].granularity == "input_channel"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model, batch_of("llama")), logits(whole, batch_of("llama")))


def test_checkpoints_that_cannot_be_compared(tmp_path):
    base = saved_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.norm.weight"

    def compare(changed, **options):
        save_file(changed, tmp_path / "tuned.safetensors")
        return extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), **options)

    with pytest.raises(ValueError, match=r"lacks 1 tensors of .* such as 'model.norm.weight'"):
        compare({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"'model.norm.weight' is F32 \(16,\) in .* and BF16 \(16,\)"):
        compare({**tensors, name: tensors[name].bfloat16()})
    with pytest.raises(ValueError, match="do not differ in any floating point entry"):
        compare(tensors)
    step = {"step": torch.tensor([1])}
    save_file({**tensors, **step}, tmp_path / "first.safetensors")
    save_file({**tensors, "step": torch.tensor([2])}, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="'step' differs and is I64; only floating point changes can be kept"):
        extract_adapter(Checkpoint(tmp_path / "first.safetensors"), Checkpoint(tmp_path / "second.safetensors"))
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\], got 2"):
        compare(tensors, density=2)
    with pytest.raises(ValueError, match=r"density=1e-09 of \d+ entries is an empty child network"):
        compare(tensors, density=1e-9)


def test_a_change_that_no_delta_expresses_is_refused_by_name(tmp_path):
    save_file({"a.b": torch.tensor([1.0, 1e30])}, tmp_path / "base.safetensors")
    save_file({"a.b": torch.tensor([2.0, 1.0])}, tmp_path / "tuned.safetensors")
    base, tuned = (Checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    with pytest.raises(
        ValueError, match=r"change of 'a.b' cannot be kept. The change from 1.00*150474662e\+30 to 1.0 at position 1"
    ):
        write_adapter(tmp_path / "child", extract_adapter(base, tuned))
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}
    assert extract_adapter(base, tuned, density=0.5).deltas["a.b"].indices.tolist() == [1]
