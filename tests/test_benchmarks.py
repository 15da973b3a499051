"""The benchmarks run and have a row for everything; what they measure is for people to read on a quiet machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, plan

from .glue_data import save_model, save_task


ROOT = Path(__file__).parents[1]


def run(script, folder):
    """What a quick run writes, as text and as data."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--threads", "1", "--output", str(folder)]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert not ran.returncode, ran.stderr
    assert "Warning" not in ran.stderr
    return (folder / "benchmarks.md").read_text(), json.loads((folder / "benchmarks.json").read_text())


@pytest.mark.slow
@pytest.mark.by_hand
def test_the_benchmark_measures_every_method_and_phase(tmp_path):
    page, stored = run("run", tmp_path)
    assert [case["model"] for case in stored["peers"]["cases"]] == ["tiny encoder", "tiny llama"]
    for row in ("full fine-tuning", "the authors' CT_D", "gradient hooks of CT_D", "PEFT SHiRA", "PEFT LoRA, r = 8"):
        assert page.count(f"\n| {row} |") >= 2
    for row in (
        "PEFT LoRA, as many values",
        "**Child-Tuning, CT_D**",
        "**Child-Tuning, random**",
        "**Child-Tuning, input channels**",
    ):
        assert page.count(f"\n| {row} |") >= 4  # steps and files of two models
    for case in stored["peers"]["cases"]:
        steps = case["steps"]["2 x 8"]
        assert len(steps) == 11
        assert all({"forward", "backward", "inference"} <= phases.keys() for phases in steps.values())
        assert all(len(turns) == 3 for phases in steps.values() for turns in phases.values())
        assert case["trained"]["task_driven"] == case["trained"]["random"] == round(0.1 * case["targeted"])
        assert case["trained"]["task_free"] == case["targeted"]
        assert case["file sizes"]["task_driven"] < case["file sizes"]["shira"]


@pytest.mark.slow
@pytest.mark.by_hand
def test_input_channels_are_measured_beside_the_others(tmp_path):
    page, stored = run("channels", tmp_path)
    assert page.count(": **input channels** |") == 2
    assert stored["channels"]["cases"][0]["memory"].keys() == {"full", "lora", "random", "channels"}
    assert "\nA Fisher pass takes " in page


@pytest.mark.slow
@pytest.mark.by_hand
def test_growth_fits_every_phase_and_keeps_the_other_part_of_the_page(tmp_path):
    (tmp_path / "benchmarks.json").write_text(json.dumps({"other": {}}))
    page, stored = run("growth", tmp_path)
    assert stored["other"] == {}
    assert [len(stored["growth"][axis]) for axis in ("size", "density", "batch")] == [3, 2, 2]
    for row in ("pass, native", "pass, ours", "Fisher pass", "choice", "save", "load", "merge", "training"):
        assert f"\n| {row} |" in page


def test_the_page_on_large_models_has_the_plan():
    assert plan.table() in (ROOT / "docs" / "scale.md").read_text()
    shape = plan.LLAMAS["8B"]
    assert shape.linear + shape.others == 8_029_995_008  # Llama 3.1 8B has 8,030,261,248 weights with its norms


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, about SHiRA
def test_the_command_for_a_gpu_runs_tiny_without_one(tmp_path):
    results = gpu.main(["--output", str(tmp_path), "--no-tests", "--turns", "1"])
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"\n| {method} |" in page for method in gpu.METHODS)
    assert "\n| input_channel |" in page
    assert json.loads((tmp_path / "gpu.json").read_text())["weights"] == results["weights"]


@pytest.mark.slow
def test_conversion_to_lora_is_measured_by_rank(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    from benchmarks import conversion

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", "stsb")
    arguments = ["--model", str(tmp_path / "encoder"), "--data", str(tmp_path / "data"), "--task", "stsb", "--bf16"]
    small = ["--epochs", "1", "--seeds", "1", "--num-fisher-examples", "8", "--ranks", "1", "16"]
    measured = conversion.main([*arguments, *small, "--output", "docs"])
    page = (tmp_path / "docs" / "conversion.md").read_text()
    assert str(tmp_path) not in page
    for network, (rows,) in measured.items():
        assert f"\n## {network.title}\n" in page
        least, most = rows["LoRA, rank 1"], rows["LoRA, rank 16"]
        assert 1 > least["error"] > 1e-2
        assert most["error"] < 1e-5  # no weight has a higher rank
        assert least["bytes"] < most["bytes"]
        assert rows[conversion.CHILD]["bytes"] > 0
        assert all(-1 <= row["score"] <= 1 for row in rows.values())
    assert page.count("\n| LoRA, rank 16 |") == len(conversion.NETWORKS)
