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
from .sft_data import save_language_model, save_rows


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "it/s" not in process.stderr  # progress bars are for terminals
    return process.stdout


def run_here(name, arguments, connection):
    sys.argv = [name, *arguments]
    error = None
    with redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(EXAMPLES / name, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    connection.send((error, printed.getvalue()))


def run_forked(name, *arguments):
    """What `run(name, ...)` prints, without the ten seconds that a new process takes to import everything."""
    process, connection = forked(run_here, name, list(map(str, arguments)))
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
        ("random", "mine", {"accuracy"}),
    ],
)
def test_glue(tmp_path, method, task, metrics):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", task)
    run_example = partial(run, "glue.py") if method == "child" else partial(run_forked, "glue.py")
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
    assert ("labels: 0 no, 1 yes\n" in printed) == (task == "mine")
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert results[-1]["bytes"] == saved.stat().st_size
    assert (results[-1]["settings"]["model"], results[-1]["settings"]["data"]) == ("encoder", "data")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("child", ["--granularity", "input_channel", "--chat"]),
        ("child", ["--variant", "random"]),
        ("full", []),
        ("lora", ["--rank", 2]),
        ("shira", []),
    ],
)
def test_sft(tmp_path, method, more):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    save_rows(tmp_path / "data", "copy", ("question", "answer"))
    printed = run_forked(
        "sft.py",
        "--model", tmp_path / "model", "--data", tmp_path / "data" / "copy", "--columns", "question", "answer",
        "--method", method, "--steps", 4, "--evaluate-every", 2, "--learning-rate", 0.03, "--max-length", 24,
        "--held-out-old", 1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out", *more,
    )  # fmt: skip
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert [step for step, *_ in result["curve"]] == [0, 2, 4]
    assert result["curve"][-1][1:] == [result["metrics"]["new"], result["metrics"]["old"]]
    assert result["curve"][-1][1] != result["curve"][0][1]
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert result["bytes"] == saved.stat().st_size
    assert f"{result['entries']:,} trained values" in printed
    assert str(tmp_path) not in json.dumps(result)


def test_sft_of_a_single_file_with_its_own_old_text(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    rows = [
        {"text": f"w{number % 40}\N{LINE SEPARATOR}w{number % 7}"} for number in range(60)
    ]  # not the end of a line
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    (tmp_path / "old.txt").write_text("w1 w2 w3 " * 300)
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--old-text", tmp_path / "old.txt"]
    run_forked(
        "sft.py", *arguments, "--steps", 1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out"
    )
    settings = json.loads((tmp_path / "results.jsonl").read_text())["settings"]
    assert (settings["data"], settings["old_text"]) == (["rows.jsonl"], ["old.txt"])


def test_sft_says_what_is_wrong_with_its_options(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    save_rows(tmp_path / "data", "copy", ("question", "answer"))
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "data" / "copy", "--columns", "question", "text"]
    with pytest.raises(AssertionError, match=r"columns of the rows, \['question', 'answer'\]; got text"):
        run_forked("sft.py", *arguments)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(AssertionError, match=r"model' has no chat template, so leave --chat out"):
        run_forked("sft.py", *arguments, "--chat")


def test_glue_keeps_the_largest_changes(tmp_path):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", "mrpc")
    run_forked(
        "glue.py",
        "--model", tmp_path / "encoder", "--data", tmp_path / "data", "--method", "task_free",
        "--epochs", 1, "--keep", 0.3, 0.1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out",
    )  # fmt: skip
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(result["kept"]) == ["0.3", "0.1"]
    assert result["entries"] == 406 + 34  # a tenth of the targeted entries, and the head
