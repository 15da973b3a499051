"""Adapters and checkpoints on disk: what is streamed equals what a model in memory gives."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_child import FormatError
from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint, replacing
from peft_child.files.combination import combine_adapters, compare_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import NamesDifferError, export_patch, merge_checkpoint

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move
from ..problems import batch_of, build, tiny_llama
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


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Gradients of float16 weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "4KB"])
def test_merging_files_equals_merging_a_model(tmp_path, dtype, tied, shard_size):
    base = saved_base(tmp_path / "base", dtype, tied, shard_size)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard_size == "4KB")
    model = saved_adapter(base, tmp_path / "child", target_modules=["q_proj", "embed_tokens", "norm"])
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "expected", max_shard_size=shard_size)
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tensors_of(tmp_path / "expected")))
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in base.iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "child")
    assert torch.equal(logits(merged, batch_of("llama")), logits(again, batch_of("llama")))


def test_a_single_file_is_merged_too(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(base, tmp_path / "child")
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base / "model.safetensors"), tmp_path / "merged")
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "whole")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_extracted_gives_the_tuned_checkpoint_back(tmp_path, dtype):
    base = saved_base(tmp_path / "base", dtype)
    tuned = load_file(base / "model.safetensors")
    for tensor in tuned.values():
        moved = torch.rand(tensor.shape) < 0.1
        tensor[moved] = (tensor[moved] * (1 + 0.1 * torch.randn(int(moved.sum())))).to(dtype)
    tuned["model.norm.weight"][:3] = torch.tensor([1.2345e-5, 0.0, -3.21e-4]).to(dtype)  # far from 1
    save_file(tuned, tmp_path / "tuned.safetensors", metadata={"format": "pt"})
    adapter = extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"))
    wide = adapter.deltas["model.norm.weight"].values.dtype
    assert wide == (torch.float64 if dtype == torch.float32 else torch.float32)
    write_adapter(tmp_path / "child", adapter)
    merge_checkpoint(read_adapter(tmp_path / "child"), Checkpoint(base), tmp_path / "merged")
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tuned))
    # and PEFT loads it
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "child", check_base="error"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model, batch_of("llama")), logits(merged, batch_of("llama")))
    assert_same(bits(model.merge_and_unload().state_dict()), bits(merged.state_dict()))


def test_extracting_at_a_density_takes_the_largest_changes(tmp_path):
    base = saved_base(tmp_path / "base")
    before = load_file(base / "model.safetensors")
    tuned = {name: tensor + torch.randn(tensor.shape) for name, tensor in before.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    adapter = extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), density=0.01)
    total = sum(tensor.numel() for tensor in before.values())
    assert sum(delta.indices.numel() for delta in adapter.deltas.values()) == round(0.01 * total)
    changes = torch.cat([(tuned[name] - before[name]).abs().flatten() for name in before])
    least = min(delta.values.abs().min() for delta in adapter.deltas.values())
    assert (changes > least).sum() < round(0.01 * total)


def test_checkpoints_that_cannot_be_compared(tmp_path):
    base = saved_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.norm.weight"

    def compare(changed, **options):
        save_file(changed, tmp_path / "tuned.safetensors")
        return extract_adapter(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), **options)

    with pytest.raises(ValueError, match=r"lacks 1 tensors of .* such as 'model.norm.weight'"):
        compare({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"'model.norm.weight' is F32 \(16,\) in .* and BF16 \(16,\)"):
        compare({**tensors, name: tensors[name].bfloat16()})
    with pytest.raises(ValueError, match="do not differ in any floating point entry"):
        compare(tensors)
    step = {"step": torch.tensor([1])}
    save_file({**tensors, **step}, tmp_path / "first.safetensors")
    save_file({**tensors, "step": torch.tensor([2])}, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="'step' differs and is I64; only floating point changes can be kept"):
        extract_adapter(Checkpoint(tmp_path / "first.safetensors"), Checkpoint(tmp_path / "second.safetensors"))
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 2"):
        compare(tensors, density=2)
    with pytest.raises(ValueError, match=r"density=1e-09 of \d+ entries is an empty child network"):
        compare(tensors, density=1e-9)


def test_a_change_that_no_delta_expresses_is_refused_by_name(tmp_path):
    save_file({"a.b": torch.tensor([1.0, 1e30])}, tmp_path / "base.safetensors")
    save_file({"a.b": torch.tensor([2.0, 1.0])}, tmp_path / "tuned.safetensors")
    base, tuned = (Checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    with pytest.raises(
        ValueError, match=r"change of 'a.b' cannot be kept. The change from 1.00*150474662e\+30 to 1.0 at position 1"
    ):
        write_adapter(tmp_path / "child", extract_adapter(base, tuned))
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}
    assert extract_adapter(base, tuned, density=0.5).deltas["a.b"].indices.tolist() == [1]


@pytest.mark.filterwarnings("ignore:Gradients of float16 weights")
def test_a_patch_applied_with_numpy_gives_the_merged_checkpoint(tmp_path):
    import numpy as np
    from safetensors.numpy import load_file as load_arrays

    base = saved_base(tmp_path / "base", torch.float16)
    saved_adapter(base, tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    export_patch(adapter, Checkpoint(base), tmp_path / "patch.safetensors")
    merge_checkpoint(adapter, Checkpoint(base), tmp_path / "merged")
    patch = load_arrays(tmp_path / "patch.safetensors")
    arrays = load_arrays(base / "model.safetensors")
    for name in adapter.deltas:
        assert patch[f"{name}.indices"].dtype == np.int32
        flat = arrays[name].reshape(-1)
        flat[patch[f"{name}.indices"]] = patch[f"{name}.values"]
    expected = load_arrays(tmp_path / "merged/model.safetensors")
    assert all(np.array_equal(arrays[name].view(np.uint16), expected[name].view(np.uint16)) for name in arrays)


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
    with pytest.raises(ValueError, match="Modules saved whole cannot be combined, and 'x' is one"):
        combine_adapters([adapter, adapter], [1.0, 1.0])
    with pytest.raises(ValueError, match="A patch holds entries only; 'x' was saved whole"):
        export_patch(adapter, None, tmp_path / "x")


def test_another_base_is_noticed(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(base, tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    torch.manual_seed(5)
    tiny_llama().save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="other weights than the adapter was made on") as warned:
        merge_checkpoint(adapter, Checkpoint(tmp_path / "other"), tmp_path / "merged")
    assert len(warned) == 1
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"entries in .*wide', the adapter's has"):
        merge_checkpoint(adapter, Checkpoint(tmp_path / "wide"), tmp_path / "no")
    build("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(NamesDifferError, match=r"has no tensor 'model.layers"):
        merge_checkpoint(adapter, Checkpoint(tmp_path / "bert"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_is_no_adapter_or_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder of an adapter: it has no 'adapter_config.json'"):
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
    with pytest.raises(FileNotFoundError, match="is no safetensors file, and no folder with"):
        Checkpoint(tmp_path / "child")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text.safetensors' is no safetensors file"):
        Checkpoint(tmp_path / "text.safetensors")
    (tmp_path / "base/model.safetensors").unlink()  # which would be preferred to an index
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="is no index of a checkpoint: it needs a 'weight_map'"):
        Checkpoint(tmp_path / "base")
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside its own folder"):
        Checkpoint(tmp_path / "base")


def test_nothing_is_replaced_without_force_and_never_by_halves(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError, match="exists already; pass force"), replacing(target, force=False):
        pass

    def fail():
        with replacing(target, force=True) as temporary:
            temporary.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    with replacing(target, force=True) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_reading_an_adapter_gives_what_the_model_has(tmp_path):
    model = saved_adapter(saved_base(tmp_path / "base"), tmp_path / "child")
    adapter = read_adapter(tmp_path / "child")
    assert_same({name: delta.indices for name, delta in adapter.deltas.items()}, child_of(model))
    assert adapter.settings["density"] == config_for("llama").density
    assert adapter.settings["child_sizes"] == {name: list(size) for name, size in adapter.sizes.items()}


MEASURED = """
import re, sys, tempfile
from pathlib import Path
from peft_child.files.adapter_folder import open_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.combination import combine_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import export_patch, merge_checkpoint

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
