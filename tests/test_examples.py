"""The examples run as their users run them, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .problems import tiny_bert


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


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
    ("method", "task", "metric"),
    [("child", "mrpc", "eval_f1"), ("full", "stsb", "eval_spearman"), ("lora", "cola", "eval_matthews")],
)
def test_glue(tmp_path, method, task, metric):
    words = ["[PAD]", "[UNK]", "the", "a", "cat", "dog", "sat", "ran"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    tiny_bert().bert.save_pretrained(tmp_path)
    texts = {"sentence": "the cat sat"} if task == "cola" else {"sentence1": "the cat sat", "sentence2": "a dog ran"}
    rows = [json.dumps({**texts, "label": 0.5 * index if task == "stsb" else index % 2}) for index in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    printed = run(
        "glue.py", "--model", tmp_path, "--task", task, "--method", method, "--epochs", 1, "--batch-size", 4,
        "--train-file", tmp_path / "rows.jsonl", "--validation-file", tmp_path / "rows.jsonl",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert metric in printed
    assert ("child network: " in printed) == (method == "child")
    assert (tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")).exists()
