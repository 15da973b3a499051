"""What `inspect` counts."""

import json

import pytest

from peft_child.files.adapter_folder import read_adapter

from .commands import output_of


@pytest.mark.smoke
def test_inspect_as_json_is_complete(files):
    adapter = read_adapter(files / "chosen")
    found = json.loads(output_of("inspect", files / "chosen", "--json"))
    assert found["settings"] == {key: value for key, value in adapter.settings.items() if key != "child_sizes"}
    assert found["settings"]["base_model_name_or_path"] == str(files / "base")
    for name, delta in adapter.deltas.items():
        assert found["tensors"].pop(name) == {
            "tensors": 1,
            "numel": delta.numel,
            "chosen": delta.indices.numel(),
            "density": delta.indices.numel() / delta.numel,
            "index_bytes": adapter.sizes[name][2],
            "delta_bytes": 4 * delta.indices.numel(),
            "norm": pytest.approx(float(delta.values.norm())),
            "dtype": "float32",
        }
    assert not found["tensors"]
    assert list(found["layers"]) == ["0", "1"]
    assert "self_attn.v_proj" in found["modules"]
    for groups in (found["layers"], found["modules"]):
        for key in ("tensors", "numel", "chosen", "index_bytes", "delta_bytes"):
            assert sum(part[key] for part in groups.values()) == found["total"][key]
        squares = sum(part["norm"] ** 2 for part in groups.values())
        assert squares == pytest.approx(found["total"]["norm"] ** 2)
