"""What the command line prints: tables, settings, and nothing that controls a terminal."""

import io
import json
import shutil
import sys

import pytest
from transformers import (
    AutoModelForSequenceClassification,
)

from peft_child.cli import output as terminal
from peft_child.files.adapter_folder import CONFIG_NAME, read_adapter

from ..files.test_operations import saved_adapter, saved_base
from ..helpers import chosen_model
from ..problems import tiny_bert
from .commands import output_of


def test_inspect_prints_tables(files):
    assert ".weight" not in output_of("inspect", files / "chosen")
    printed = output_of("inspect", files / "chosen", "--tensors")
    adapter = read_adapter(files / "chosen")
    assert f"base: {files / 'base'}\n" in printed
    assert (
        "settings: variant task_driven, density 0.3, granularity entry, delta_dtype float32, fisher per_example"
        in printed
    )
    rows = [line.split() for line in printed.splitlines()]
    for name, delta in adapter.deltas.items():
        row = next(row for row in rows if row[:1] == [name])
        assert row[1:3] == [f"{delta.indices.numel():,}", f"{delta.numel:,}"]
        assert row[4:6] == [f"{adapter.sizes[name][2]:,}", f"{4 * delta.indices.numel():,}"]
    assert [row[0] for row in rows if row][-1] == "total"
    assert "seed 1" in output_of("inspect", files / "random")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"variant": "random", "gradient_density": 0.5, "resample_every": 4},
            "granularity entry, delta_dtype float32, seed 0, gradient_density 0.5, resample_every 4",
        ),
        (
            {"variant": "task_free", "resample_every": 2},
            "task_free, density 0.3, granularity entry, delta_dtype float32, resample_every 2",
        ),
    ],
    ids=["fixed", "task_free"],
)
def test_inspect_shows_gradient_masks(tmp_path, changes, shown):
    saved_adapter(saved_base(tmp_path / "base"), tmp_path / "child", **changes)
    assert shown in output_of("inspect", tmp_path / "child")
    settings = json.loads(output_of("inspect", tmp_path / "child", "--json"))["settings"]
    assert settings["gradient_density"] == changes.get("gradient_density", 1.0)
    assert settings["resample_every"] == changes["resample_every"]


def test_inspect_knows_modules_saved_whole(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = chosen_model("bert", AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "child")
    found = json.loads(output_of("inspect", tmp_path / "child", "--json"))
    assert found["saved_whole"]["base_model.model.classifier.weight"] == {
        "shape": [2, 16],
        "dtype": "float32",
        "bytes": 128,
    }
    printed = output_of("inspect", tmp_path / "child")
    assert "saved whole: base_model.model.classifier.bias, float32 [2], 8 bytes" in printed
    assert found["layers"]["none"]["tensors"] == 2  # of the pooler
    assert list(found["layers"]) == ["0", "1", "none"]


def test_names_from_a_file_cannot_control_the_terminal(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((files / "chosen" / CONFIG_NAME).read_text())
    settings["base_model_name_or_path"] = "\x1b[2Jbase\nerror: [bold]none"
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps(settings))
    assert "base: \\x1b[2Jbase error: [bold]none\n" in output_of("inspect", tmp_path / "child")


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(terminal.progress(["a", "b"], "Merging")) == ["a", "b"]
    assert shown.getvalue() == ""
    monkeypatch.setattr(shown, "isatty", lambda: True)
    assert list(terminal.progress(["a", "b"], "Merging")) == ["a", "b"]
    assert "Merging" in shown.getvalue()
