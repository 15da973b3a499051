"""Adapters and checkpoints on disk: what is streamed equals what a model in memory gives."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from peft_child.files.adapter_folder import read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.combination import combine_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import export_patch

from ..helpers import chosen_model, move
from ..problems import tiny_llama
from ..ranks import forked


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint[name] for name in checkpoint.places}


def bits(tensors):
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def saved_base(folder, dtype=torch.float32, tied=False, shard_size="5GB"):
    torch.manual_seed(0)
    model = tiny_llama(tied).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.txt").write_text("beside the weights")
    return folder


def saved_adapter(base, folder, **changes):
    model = AutoModelForCausalLM.from_pretrained(base)
    child = chosen_model("llama", model, task_type="CAUSAL_LM", **changes)
    move(child, adapter_name="default")
    child.save_pretrained(folder)
    return child


MEASURED = """
import re, sys, tempfile
from pathlib import Path
from peft_child.files.adapter_folder import open_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.combination import combine_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import export_patch

folder = Path(sys.argv[1])

def run(work, size):
    base, tuned = (Checkpoint(folder / f"{size}-{kind}.safetensors") for kind in ("base", "tuned"))
    child = folder / f"{size}-child"
    if work in ("lossless", "density"):
        adapter = extract_adapter(base, tuned, 0.3 if work == "density" else None)
        write_adapter(folder / work, adapter, force=True)
    elif work == "merge":
        merge_checkpoint(open_adapter(child), base, folder / work, force=True)
    elif work == "combine":
        write_adapter(folder / work, combine_adapters([open_adapter(child)] * 2, [0.5, 0.5]), force=True)
    else:
        export_patch(open_adapter(child), base, folder / work, force=True)

def peak(work, size):
    Path("/proc/self/clear_refs").write_text("5")
    run(work, size)
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

for work in sys.argv[2:]:
    run(work, "small")  # imports and caches
    print(peak(work, "small"), peak(work, "large"))
"""


ENTRIES = 1 << 20


@pytest.fixture(scope="module")
def large_files(tmp_path_factory):
    """A checkpoint of two tensors and one of 24, what became of them, and the adapters of the difference."""
    folder = tmp_path_factory.mktemp("large")
    for size, count in (("small", 2), ("large", 24)):
        torch.manual_seed(0)
        base = {f"layers.{index}.weight": torch.randn(1024, ENTRIES // 1024) for index in range(count)}
        save_file(base, folder / f"{size}-base.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in base.items()}, folder / f"{size}-tuned.safetensors")
        before, after = (Checkpoint(folder / f"{size}-{kind}.safetensors") for kind in ("base", "tuned"))
        write_adapter(folder / f"{size}-child", extract_adapter(before, after))
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells and resets the peak of memory")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tensors(large_files):
    works = ["lossless", "density", "merge", "combine", "patch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
    arguments = [sys.executable, "-c", MEASURED, large_files, *works]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    peaks = dict(zip(works, done.stdout.splitlines(), strict=True))
    growth = {work: int(line.split()[1]) - int(line.split()[0]) for work, line in peaks.items()}
    # 22 tensors more: 88 MiB in the checkpoint, 264 MiB as the positions and values of a child network
    assert max(growth.values()) < 2 * 4 * ENTRIES, growth


RUNS = {
    "merge": lambda child, base, path: merge_checkpoint(read_adapter(child), Checkpoint(base), path, force=True),
    "extract": lambda child, base, path: write_adapter(
        path, extract_adapter(Checkpoint(base), Checkpoint(f"{child}-merged")), force=True
    ),
    "combine": lambda child, base, path: write_adapter(
        path, combine_adapters([read_adapter(child)] * 2, [0.5, 1.0]), force=True
    ),
    "patch": lambda child, base, path: export_patch(read_adapter(child), Checkpoint(base), path, force=True),
}


def run_for_ever(kind, folder, connection):
    def run(name):
        RUNS[kind](folder / "child", folder / "base", folder / name)

    run("expected")
    run("output")
    connection.send("ready")
    while True:
        run("output")


def content(path):
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name if path.is_dir() else "file": file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_any_moment_the_output_is_whole_or_none(tmp_path, kind):
    base = saved_base(tmp_path / "base", shard_size="4KB")
    saved_adapter(base, tmp_path / "child")
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "child-merged")
    expected, output = tmp_path / "expected", tmp_path / "output"
    found = 0
    for moment in (0.0, random.uniform(0, 0.03), random.uniform(0, 0.1)):
        process, connection = forked(run_for_ever, kind, tmp_path)
        assert connection.recv() == "ready"
        time.sleep(moment)
        process.kill()
        process.join()
        if output.exists():
            found += 1
            assert content(output) == content(expected)
    assert found
