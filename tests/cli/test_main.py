"""The command line: each verb gives what the library gives, and whatever goes wrong is one line and exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_child import ChildTuningConfig
from peft_child.cli import main as cli
from peft_child.cli import output as terminal
from peft_child.cli.base_model import model_settings
from peft_child.files.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.combination import combine_adapters, compare_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import export_patch

from ..files.test_operations import bits, tensors_of
from ..helpers import assert_same, chosen_model
from .commands import VERBS, arguments_of, content, error_of, output_of, run, unstyled, writing


# Every verb against the library


def test_overlap(files):
    names = [str(files / name) for name in ("chosen", "random", "chosen")]
    expected = compare_adapters([read_adapter(name) for name in names])
    found = json.loads(output_of("overlap", *names, "--json"))
    assert found["adapters"] == names
    assert [pair["adapters"] for pair in found["pairs"]] == [[names[i], names[j]] for i, j in expected]
    for pair, overlaps in zip(found["pairs"], expected.values(), strict=True):
        assert pair["tensors"].keys() == overlaps.keys()
        assert pair["shared"] == sum(overlap.shared for overlap in overlaps.values())
        for name, overlap in overlaps.items():
            assert pair["tensors"][name]["jaccard"] == overlap.jaccard
            assert pair["tensors"][name]["over_chance"] == overlap.over_chance
    assert found["pairs"][1]["jaccard"] == 1
    printed = output_of("overlap", *names)
    assert f"{found['pairs'][0]['jaccard']:.4f}" in printed
    assert "model.layers" not in printed
    assert printed in output_of("overlap", *names, "--tensors")
    assert "model.layers.1.mlp.up_proj.weight" in output_of("overlap", *names, "--tensors")


def test_adapters_without_a_tensor_in_common_are_pointed_to(files, tmp_path):
    chosen_model("bert").save_pretrained(tmp_path / "bert")
    pairs = run("overlap", files / "chosen", files / "random", tmp_path / "bert").stderr.splitlines()
    assert [line.partition(" have ")[2] for line in pairs] == ["no tensor in common. Have they one base model?"] * 2
    assert all(str(tmp_path / "bert") in line for line in pairs)


def test_plots(files, tmp_path):
    pytest.importorskip("matplotlib")
    for verb, arguments in (("inspect", ["chosen"]), ("overlap", ["chosen", "random"])):
        plot = tmp_path / verb / "plot.png"
        arguments = [verb, *(files / name for name in arguments), "--plot", plot]
        output_of(*arguments, messages=f"wrote: {plot}\n")
        drawn = plot.read_bytes()
        assert drawn.startswith(b"\x89PNG\r\n")
        plot.write_bytes(b"old")
        assert f"'{plot}' exists already; pass --force" in error_of(*arguments)
        assert plot.read_bytes() == b"old"
        output_of(*arguments, "--force", messages=f"wrote: {plot}\n")
        assert plot.read_bytes() == drawn
        assert list(plot.parent.iterdir()) == [plot]


@pytest.mark.parametrize("verb", ["inspect", "overlap"])
def test_plots_are_drawn_though_nobody_reads_the_rest(files, tmp_path, monkeypatch, verb):
    """As in `peft-child inspect child --plot child.png | head -3`."""
    pytest.importorskip("matplotlib")

    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "print_settings", closed)
    monkeypatch.setattr(cli, "print_overlaps", closed)
    run(verb, *[files / "chosen"] * (1 + (verb == "overlap")), "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("density", [None, 0.01])
def test_extract(files, tmp_path, density):
    options = [] if density is None else ["--density", density]
    printed = output_of("extract", files / "base", files / "tuned.safetensors", tmp_path / "child", *options)
    expected = extract_adapter(Checkpoint(files / "base"), Checkpoint(files / "tuned.safetensors"), density)
    expected.settings |= {**model_settings(files / "base"), "revision": None}
    write_adapter(tmp_path / "expected", expected)
    assert content(tmp_path / "child") == content(tmp_path / "expected")
    assert printed == f"extracted {terminal.counts(read_adapter(tmp_path / 'expected'))} to {tmp_path / 'child'}\n"
    if density is None:
        output_of("merge", tmp_path / "child", files / "base", tmp_path / "merged")
        assert_same(bits(tensors_of(tmp_path / "merged")), bits(load_file(files / "tuned.safetensors")))


@pytest.mark.smoke
def test_merge_and_patch(files, tmp_path):
    adapter, base = read_adapter(files / "chosen"), Checkpoint(files / "base")
    merge_checkpoint(adapter, base, tmp_path / "expected")
    printed = output_of("merge", files / "chosen", files / "base", tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "expected")
    assert printed == f"merged {terminal.counts(adapter)} into {tmp_path / 'merged'}\n"
    export_patch(adapter, base, tmp_path / "expected.safetensors")
    printed = output_of("patch", files / "chosen", files / "base", tmp_path / "patch.safetensors")
    assert content(tmp_path / "patch.safetensors") == content(tmp_path / "expected.safetensors")
    assert printed.startswith("wrote 1,306 of the 3,328 entries of 10 tensors to ")
    export_patch(adapter, base, tmp_path / "again.safetensors", undo=tmp_path / "expected-undo.safetensors")
    undo, patch = tmp_path / "undo.safetensors", tmp_path / "patch.safetensors"
    printed = output_of("patch", files / "chosen", files / "base", patch, "--undo", undo, "--force")
    assert content(undo) == content(tmp_path / "expected-undo.safetensors")
    assert printed.endswith(f", and back to {undo}\n")
    for file, problem in ((undo, "exists already"), (patch, "exists already"), (tmp_path, "is a folder")):
        arguments = ["patch", files / "chosen", files / "base", tmp_path / "new.safetensors", "--undo"]
        assert problem in error_of(*arguments, file)
    assert "name another file for --undo" in error_of(*arguments, tmp_path / "new.safetensors")
    inside = files / "base" / "model.safetensors"
    assert "name another output" in error_of(*arguments, inside, "--force")
    assert not (tmp_path / "new.safetensors").exists()


def test_changes_too_small_for_the_base_are_counted(files, tmp_path):
    small = combine_adapters([read_adapter(files / "chosen")], [1e-3])
    write_adapter(tmp_path / "small", small)
    printed = output_of("merge", tmp_path / "small", files / "base", tmp_path / "merged")
    before, after = Checkpoint(files / "base"), Checkpoint(tmp_path / "merged")
    unseen = sum(
        bool(value) and after[name].view(-1)[position].equal(before[name].view(-1)[position])
        for name, delta in small.deltas.items()
        for position, value in zip(delta.indices, delta.values, strict=True)
    )
    assert 0 < unseen < sum(len(delta.values) for delta in small.deltas.values())
    assert printed.endswith(f"; {unseen:,} of the changes are too small to show in the dtype of the base\n")


def test_combine(files, tmp_path):
    names = [files / "chosen", files / "random"]
    adapters = [read_adapter(name) for name in names]
    options = ["--type", "dare_ties", "--density", 0.5, "--majority-sign", "frequency", "--seed", 3]
    output_of("combine", tmp_path / "combined", *names, "--weight", 0.7, "--weight", -0.3, *options)
    expected = combine_adapters(
        adapters,
        [0.7, -0.3],
        combination_type="dare_ties",
        density=0.5,
        majority_sign_method="frequency",
        seed=3,
    )
    write_adapter(tmp_path / "expected", expected)
    assert content(tmp_path / "combined") == content(tmp_path / "expected")
    output_of("combine", tmp_path / "same", names[0])
    assert (tmp_path / "same" / WEIGHTS_NAME).read_bytes() == (names[0] / WEIGHTS_NAME).read_bytes()


def test_verify(files):
    counts = "1,306 of the 3,328 entries of 10 tensors"
    assert output_of("verify", files / "chosen") == f"ok: {counts}\n"
    found = output_of("verify", files / "chosen", "--base", files / "base")
    assert found == f"ok: {counts}, made on {files / 'base'}\n"


# The model card


@pytest.mark.parametrize("verb", ["extract", "combine"])
def test_what_is_written_has_a_model_card_and_a_heat_map(files, tmp_path, verb):
    pytest.importorskip("matplotlib")
    output_of(*writing(verb, files, tmp_path / "child"))
    config = ChildTuningConfig.from_pretrained(str(tmp_path / "child"))
    written, heat_map = ((tmp_path / "child" / name).read_bytes() for name in ("README.md", "child_network.png"))
    card = written.replace(b"- **Stored in:** `float32`\n", b"")
    for name in ("README.md", "child_network.png"):
        (tmp_path / "child" / name).unlink()
    config.save_pretrained(str(tmp_path / "child"))
    assert b"## Child-Tuning adapter" in card
    saved = (tmp_path / "child/README.md").read_bytes()
    assert saved.replace(b"- **Stored in:** `float32`\n", b"") == card  # deltas of checkpoints may be of two dtypes
    assert (tmp_path / "child/child_network.png").read_bytes() == heat_map


def test_the_model_card_does_without_matplotlib(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output_of(*writing("extract", files, tmp_path / "child"))
    assert "child_network.png" not in (tmp_path / "child/README.md").read_text()
    assert {path.name for path in (tmp_path / "child").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}


# Merging through the model


# Adapters in subfolders


# Bad input


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "There is no file or folder '{}', and it is not a valid name of a repository on the Hub."),
        ("base", "is not an adapter folder: it has no 'adapter_config.json'"),
        ("lora", "is an adapter of type 'LORA', not of Child-Tuning"),
        ("damaged", "cannot be loaded. The checksum of "),
    ],
)
def test_what_is_no_adapter(files, tmp_path, verb, name, problem):
    if verb == "extract" and name != "missing":
        name, problem = "chosen", "is neither a safetensors file nor a folder with 'model.safetensors'"
    message = error_of(verb, *arguments_of(verb, files / name, tmp_path / "new", files / "base"))
    assert problem.format(files / name) in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["merge", "patch", "verify"])
def test_a_base_of_other_shapes(files, tmp_path, verb):
    arguments = arguments_of(verb, files / "chosen", tmp_path / "new", files / "wide")
    message = error_of(verb, *arguments, *(["--base", files / "wide"] if verb == "verify" else []))
    assert "'model.layers.0.mlp.down_proj.weight' has 768 entries in " in message
    assert not (tmp_path / "new").exists()
    assert "they must be the same" in error_of("extract", files / "base", files / "wide", tmp_path / "new")


def test_another_base_is_a_warning_or_an_error(files, tmp_path):
    for verb, output in (("merge", "merged"), ("patch", "patch.safetensors")):
        result = run(verb, files / "chosen", files / "other", tmp_path / output)
        assert result.exit_code == 0
        assert all(
            line.startswith("warning: ") and "are not those that the adapter was made on" in line
            for line in result.stderr.splitlines()
        )
        assert result.stderr
        assert (tmp_path / output).exists()
    message = error_of("verify", files / "chosen", "--base", files / "other")
    assert "are not those that the adapter was made on; 'model.layers" in message


def test_options_out_of_range(files, tmp_path):
    adapters = files / "chosen", files / "random"
    new = tmp_path / "new"
    for arguments, problem in (
        (["overlap", adapters[0]], "compares two or more adapters, got one"),
        (["overlap", *adapters, *["--revision", "x"] * 3], "once for all 2 adapters or once for each, got 3"),
        (
            ["extract", files / "base", files / "tuned.safetensors", new, "--density", 2],
            "must be a number in (0, 1], got 2.0",
        ),
        (["extract", files / "base", files / "base", new], "do not differ"),
        (["combine", new, *adapters, "--weight", 1], "got 2 adapters and 1 weights"),
        (["combine", new, *adapters, "--type", "svd"], "must be one of linear, ties, "),
        (["combine", new, *adapters, "--density", 0], "density must be a number in (0, 1]"),
        (["inspect", adapters[0], "--plot", tmp_path], "is a folder; name a file"),
    ):
        assert problem in error_of(*arguments)
    assert not new.exists()


def test_settings_that_peft_could_not_read(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((files / "chosen" / CONFIG_NAME).read_text())
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps({**settings, "density": 7}))
    assert "density must be a number in (0, 1], got 7" in error_of("verify", tmp_path / "child")
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps({**settings, "child_sizes": None}))
    save_file({"classifier.weight": torch.ones(2)}, tmp_path / "child" / WEIGHTS_NAME)
    assert "holds no child network" in error_of("verify", tmp_path / "child")
    assert json.loads(output_of("inspect", tmp_path / "child", "--json"))["total"]["chosen"] == 0


# Help and progress


@pytest.mark.smoke
def test_the_installed_command():
    command = Path(sys.executable).with_name("peft-child")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    printed = unstyled(done.stdout)
    assert "An adapter is a small file of changes to some weights" in printed
    assert all(f"{verb} " in printed for verb in VERBS)


def test_the_version():
    assert output_of("--version") == f"peft-child {version('peft-child')}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    printed = unstyled(output_of(verb, "--help"))
    assert re.search(f"Example: peft-child {verb} (./|org/)", printed)
    assert "[required]" in printed
