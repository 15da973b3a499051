"""The examples run as their users run them, small."""

import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from .glue_data import save_model, save_task
from .ranks import forked


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_glue(arguments, connection):
    sys.argv = ["glue.py", *arguments]
    error = None
    with redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(EXAMPLES / "glue.py", run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    connection.send((error, printed.getvalue()))


def fork_glue(*arguments):
    """What `run("glue.py", ...)` prints, without the ten seconds that a new process takes to import everything."""
    process, connection = forked(run_glue, list(map(str, arguments)))
    error, printed = connection.recv()
    process.join()
    assert error is None, error
    return printed


def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--tiny", "--output", tmp_path)
    assert "same logits, bit for bit, loaded into a fresh base and merged into it" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("Base", "Full", "Child", "LoRA"))]
    assert len(rows) == 4
    for picture in ("child_network.png", "perplexities.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    child, full = (
        (tmp_path / folder).stat().st_size for folder in ("child/adapter_model.safetensors", "full/model.safetensors")
    )
    assert child < full / 3
    own = tmp_path / "own.txt"
    own.write_text("A model of one's own, on one's own text. " * 300)
    again = run(
        "quickstart.py", "--tiny", "--model", tmp_path / "base", "--new-text", own, "--output", tmp_path / "again"
    )
    assert "same logits, bit for bit" in again


@pytest.mark.parametrize(
    ("method", "task", "metrics"),
    [
        ("child", "mrpc", {"accuracy", "f1"}),
        ("full", "stsb", {"pearson", "spearman"}),
        ("lora", "cola", {"matthews"}),
        ("shira", "mnli", {"accuracy"}),
        ("task_free", "snli", {"accuracy"}),
    ],
)
def test_glue(tmp_path, method, task, metrics):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", task)
    run_example = partial(run, "glue.py") if method == "child" else fork_glue
    printed = run_example(
        "--model", tmp_path / "encoder", "--data", tmp_path / "data", "--task", task, "--method", method,
        "--epochs", 1, "--seeds", 1, 2, "--bf16", "--results", tmp_path / "results.jsonl",
        "--output", tmp_path / "out",
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["seed"] for result in results] == [1, 2]
    assert all(set(result["metrics"]) == metrics for result in results)
    assert all(f"{name}: " in printed for name in metrics)
    assert ("child network: " in printed) == (method == "child")
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert results[-1]["bytes"] == saved.stat().st_size
    assert (results[-1]["settings"]["model"], results[-1]["settings"]["data"]) == ("encoder", "data")


def test_glue_keeps_the_largest_changes(tmp_path):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", "mrpc")
    fork_glue(
        "--model", tmp_path / "encoder", "--data", tmp_path / "data", "--method", "task_free",
        "--epochs", 1, "--keep", 0.3, 0.1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out",
    )  # fmt: skip
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(result["kept"]) == ["0.3", "0.1"]
    assert result["entries"] == 406 + 34  # a tenth of the targeted entries, and the head
