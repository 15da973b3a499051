"""Sizes and times of adapter files: index blocks, the file beside SHiRA's, merging and extracting checkpoints.

    python -m benchmarks.files [--scores fisher.safetensors] [--gigabytes 0.5]

Without scores, the child networks are random, and bound by entropy; with the scores of a real task (the tensors that
`estimate_fisher` returns, kept with safetensors) they are those that training would have. Times are medians.
"""

import argparse
import math
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import in_fresh_process, peak_memory, timed
from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import merge_checkpoint
from peft_child.tensors.codec import decode, encode
from peft_child.tensors.delta import SparseDelta
from peft_child.tensors.topk import draw_random, select_largest


SHIRA = 12  # bytes for each entry of PEFT's SHiRA: a float32 value and two int32 positions


def seconds(function, repeats):
    """Median time of a call."""
    return median(timed(function) for _ in range(repeats))


def measure_blocks(scores, densities, repeats):
    """Print size and speed of the index blocks."""
    numel = sum(score.numel() for score in scores.values())
    print(f"\nIndex blocks, {numel:,} entries in {len(scores)} tensors, one thread, {repeats} runs")
    print(
        f"{'density':>8}{'B/entry':>9}{'entropy':>9}{'encode M/s':>12}{'decode M/s':>12}{'file/SHiRA':>12}{'bf16':>7}"
    )
    for density in densities:
        size = round(density * numel)
        chosen = {name: index.numpy() for name, index in select_largest(scores, size).items() if index.numel()}
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        blocks = {name: encode(index, shapes[name]) for name, index in chosen.items()}
        for name, block in blocks.items():
            assert (decode(block) == chosen[name]).all()
        write = seconds(lambda: [encode(index, shapes[name]) for name, index in chosen.items()], repeats)  # noqa: B023
        read = seconds(lambda: [decode(block) for block in blocks.values()], repeats)  # noqa: B023
        each = sum(map(len, blocks.values())) / size
        entropy = -(math.log2(density) + (1 - density) / density * math.log2(1 - density)) / 8
        print(
            f"{density:8}{each:9.3f}{entropy:9.3f}{size / write / 1e6:12.0f}{size / read / 1e6:12.0f}"
            f"{(4 + each) / SHIRA:12.3f}{(2 + each) / SHIRA:7.3f}"
        )


def extract_to(folder, base, tuned):
    """Make an adapter folder of the difference between two checkpoints."""
    write_adapter(folder, extract_adapter(base, tuned), force=True)


def flush(folder):
    """Wait until the files of a folder are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def peak_of(work, folder):
    """Largest memory of some work on files, in a process that does nothing else."""
    base = Checkpoint(folder / "base")
    if work == "merge":
        merge_checkpoint(read_adapter(folder / "child"), base, folder / "peak", force=True)
    if work == "extract":
        extract_to(folder / "peak", base, Checkpoint(folder / "merged"))
    if work == "read":
        read_adapter(folder / "child")
    return peak_memory()


def measure_checkpoints(gigabytes, repeats):
    """Print time and memory of merging and extracting, beside copying the files."""
    rows, columns = 4096, 2048
    count = max(1, round(gigabytes * 2**30 / (2 * rows * columns)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "base").mkdir()
        names = [f"layers.{index}.weight" for index in range(count)]
        save_file({name: torch.randn(rows, columns).bfloat16() for name in names}, folder / "base/model.safetensors")
        deltas = {}
        for name in names:
            indices = draw_random(name, rows * columns, rows * columns // 10, 0)
            deltas[name] = SparseDelta((rows, columns), indices, torch.randn(len(indices)) * 0.1)
        write_adapter(folder / "child", SparseAdapter({"peft_type": "PEFT_CHILD"}, deltas))
        adapter, base = read_adapter(folder / "child"), Checkpoint(folder / "base")
        copies, merges, readings, flushes = [], [], [], []
        for _ in range(repeats):  # in turn, each into a fresh folder, so that all meet the same disk
            for made in ("copy", "merged"):
                shutil.rmtree(folder / made, ignore_errors=True)
            copies.append(timed(lambda: shutil.copytree(folder / "base", folder / "copy")))
            merges.append(timed(lambda: merge_checkpoint(adapter, base, folder / "merged")))
            readings.append(timed(lambda: read_adapter(folder / "child")))
            flushes.append([timed(partial(flush, folder / made)) for made in ("copy", "merged")])
        ratio = median(merge / copy for merge, copy in zip(merges, copies, strict=True))
        to_disk = median(
            (merge + after) / (copy + before)
            for merge, copy, (before, after) in zip(merges, copies, flushes, strict=True)
        )
        extract = timed(lambda: extract_to(folder / "extracted", base, Checkpoint(folder / "merged")))
        work = ("nothing", "read", "merge", "extract")
        nothing, *peaks = (in_fresh_process(peak_of, kind, folder) for kind in work)
    size, largest = count * rows * columns * 2, rows * columns * 2
    print(f"\nA checkpoint of {size / 1e9:.2f} GB in bfloat16, largest tensor {largest / 1e6:.0f} MB, density 0.1")
    print(
        f"copy {median(copies):.2f} s, merge {median(merges):.2f} s ({ratio:.2f} x, median of {repeats} pairs; "
        f"{median(readings):.2f} s of it reading the adapter; {to_disk:.2f} x until all is on the disk), "
        f"extract losslessly and write {extract:.2f} s"
    )
    for kind, peak in zip(("reading the adapter", "merging", "extracting"), peaks, strict=True):
        print(f"peak memory of {kind}: {(peak - nothing) / 1e6:.0f} MB above opening the checkpoint")


def main():
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, help="safetensors file of Fisher scores")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.1, 0.3])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of the checkpoint, 0 for none (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores = (
        load_file(args.scores) if args.scores else {f"layers.{index}": torch.rand(1000, 4000) for index in range(3)}
    )
    measure_blocks(scores, args.densities, args.repeats)
    if args.gigabytes:
        measure_checkpoints(args.gigabytes, args.repeats)


if __name__ == "__main__":
    main()
