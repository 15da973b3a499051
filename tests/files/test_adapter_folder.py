"""Adapters read from folders."""

import json

import pytest

from peft_child import FormatError
from peft_child.files.adapter_folder import read_adapter
from peft_child.files.checkpoint import Checkpoint

from ..helpers import assert_same, child_of, config_for
from .test_operations import saved_adapter, saved_base


def test_what_is_no_adapter_or_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not an adapter folder: it has no 'adapter_config.json'"):
        read_adapter(tmp_path)
    saved_adapter(saved_base(tmp_path / "base"), tmp_path / "child")
    config = tmp_path / "child/adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "peft_type": "LORA"}))
    with pytest.raises(FormatError, match="adapter of type 'LORA', not of Child-Tuning"):
        read_adapter(tmp_path / "child")
    config.write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        read_adapter(tmp_path / "child")
    with pytest.raises(FileNotFoundError, match="is neither a safetensors file nor a folder with"):
        Checkpoint(tmp_path / "child")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text.safetensors' is not a safetensors file"):
        Checkpoint(tmp_path / "text.safetensors")
    (tmp_path / "base/model.safetensors").unlink()  # which would be preferred to an index
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="is not a checkpoint index: it needs a 'weight_map'"):
        Checkpoint(tmp_path / "base")
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside its own folder"):
        Checkpoint(tmp_path / "base")


def test_reading_an_adapter_gives_what_the_model_has(tmp_path):
    model = saved_adapter(saved_base(tmp_path / "base"), tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    assert_same({name: delta.indices for name, delta in adapter.deltas.items()}, child_of(model))
    assert adapter.settings["density"] == config_for("llama").density
    assert adapter.settings["child_sizes"] == {name: list(size) for name, size in adapter.sizes.items()}
