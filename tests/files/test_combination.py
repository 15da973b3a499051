"""Adapters combined and compared in folders."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.files.combination import combine_adapters, compare_adapters
from peft_child.files.patch import export_patch

from ..helpers import logits
from ..problems import batch_of
from .test_operations import saved_adapter, saved_base


def test_combining_and_comparing_folders(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(base, tmp_path / "a", variant="random", seed=0)
    saved_adapter(base, tmp_path / "b", variant="random", seed=1)
    adapters = [read_adapter(tmp_path / name) for name in "ab"]
    write_adapter(tmp_path / "same", combine_adapters(adapters[:1], [1.0]))
    assert (tmp_path / "same/adapter_model.safetensors").read_bytes() == (
        tmp_path / "a/adapter_model.safetensors"
    ).read_bytes()

    pruned = combine_adapters(adapters[:1], [1.0], combination_type="magnitude_prune", density=0.5)
    chosen = sum(delta.indices.numel() for delta in pruned.deltas.values())
    assert pruned.settings["variant"] == "extracted"
    assert pruned.settings["density"] == chosen / sum(delta.numel for delta in pruned.deltas.values()) < 0.2

    write_adapter(tmp_path / "both", combine_adapters(adapters, [1.0, 1.0]))
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "both")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(both, batch_of("llama")), logits(model, batch_of("llama")), rtol=1e-5, atol=1e-6)

    overlaps = compare_adapters([*adapters, adapters[0]])
    assert all(found.jaccard == 1 for found in overlaps[0, 2].values())
    chance = [found for found in overlaps[0, 1].values() if found.numel > 300]
    assert 0.7 < sum(found.over_chance for found in chance) / len(chance) < 1.3


def test_adapters_that_cannot_be_combined(tmp_path):
    adapter = SparseAdapter({}, {}, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="Every adapter needs one weight, got 1 adapters and 2 weights"):
        combine_adapters([adapter], [1.0, 2.0])
    with pytest.raises(ValueError, match="Modules saved whole cannot be combined; 'x' belongs to one"):
        combine_adapters([adapter, adapter], [1.0, 1.0])
    with pytest.raises(ValueError, match="A patch holds entries only; 'x' was saved whole"):
        export_patch(adapter, None, tmp_path / "x")
