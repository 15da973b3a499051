"""The command line: each verb gives what the library gives, and whatever goes wrong is one line and exit code 2."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from typer.testing import CliRunner

from peft_child import ChildTuningConfig
from peft_child.cli import locate
from peft_child.cli import main as cli
from peft_child.cli import output as terminal
from peft_child.cli.base_model import model_settings
from peft_child.files.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.combination import combine_adapters, compare_adapters
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import export_patch, merge_checkpoint

from ..files.test_operations import bits, saved_adapter, saved_base, tensors_of
from ..helpers import assert_same, chosen_model, move
from ..hubserver import File, HubServer, Repository
from ..problems import build, tiny_bert, tiny_llama


VERBS = ["inspect", "overlap", "extract", "merge", "combine", "patch", "verify"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def output_of(*arguments, messages=""):
    """Standard output of a command that works, and says on standard error no more than `messages`."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, messages), result.output
    return result.stdout


def error_of(*arguments):
    """The one line that a command says when it fails."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def unstyled(text):
    """Without the colours that typer prints where an environment variable tells it to, as CI services do."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def content(path):
    """The bytes of every file in a folder, or of the file."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.relative_to(path): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, what became of it, another base, a wider one, and adapters of the first."""
    folder = tmp_path_factory.mktemp("files")
    base = saved_base(folder / "base", torch.bfloat16)
    tuned = load_file(base / "model.safetensors")
    for tensor in tuned.values():
        tensor[torch.rand(tensor.shape) < 0.1] *= 1.5
    save_file(tuned, folder / "tuned.safetensors", metadata={"format": "pt"})
    torch.manual_seed(5)
    tiny_llama().bfloat16().save_pretrained(folder / "other")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(folder / "wide")
    saved_adapter(base, folder / "chosen")
    saved_adapter(base, folder / "random", variant="random", seed=1)
    shutil.copytree(folder / "chosen", folder / "lora")
    settings = json.loads((folder / "lora" / CONFIG_NAME).read_text())
    (folder / "lora" / CONFIG_NAME).write_text(json.dumps({**settings, "peft_type": "LORA"}))
    shutil.copytree(folder / "chosen", folder / "damaged")
    damaged = bytearray((folder / "damaged" / WEIGHTS_NAME).read_bytes())
    damaged[-1] ^= 1
    (folder / "damaged" / WEIGHTS_NAME).write_bytes(damaged)
    return folder


# Every verb against the library


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


def test_inspect_prints_tables(files):
    printed = output_of("inspect", files / "chosen")
    adapter = read_adapter(files / "chosen")
    assert f"base: {files / 'base'}\n" in printed
    assert "settings: variant task_driven, density 0.3, delta_dtype float32, fisher per_example" in printed
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
            "random, density 0.3, delta_dtype float32, seed 0, gradient_density 0.5, resample_every 4",
        ),
        (
            {"variant": "task_free", "resample_every": 2},
            "task_free, density 0.3, delta_dtype float32, resample_every 2",
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


def test_plots(files, tmp_path):
    pytest.importorskip("matplotlib")
    for verb, arguments in (("inspect", ["chosen"]), ("overlap", ["chosen", "random"])):
        plot = tmp_path / verb / "plot.png"
        arguments = [verb, *(files / name for name in arguments), "--plot", plot]
        output_of(*arguments)
        drawn = plot.read_bytes()
        assert drawn.startswith(b"\x89PNG\r\n")
        plot.write_bytes(b"old")
        assert f"'{plot}' exists already; pass --force" in error_of(*arguments)
        assert plot.read_bytes() == b"old"
        output_of(*arguments, "--force")
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
    output_of("merge", files / "chosen", files / "base", tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "expected")
    export_patch(adapter, base, tmp_path / "expected.safetensors")
    printed = output_of("patch", files / "chosen", files / "base", tmp_path / "patch.safetensors")
    assert content(tmp_path / "patch.safetensors") == content(tmp_path / "expected.safetensors")
    assert printed.startswith("wrote 1,306 of the 3,328 entries of 10 tensors to ")


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


def fused(folder):
    """Each expert has tensors of its own in the checkpoint; all of them together are one in the model."""
    build("mixtral").save_pretrained(folder)
    return chosen_model("mixtral", AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM")


def without_head(folder):
    """The checkpoint's names lack the prefix of the model's."""
    LlamaModel(tiny_llama(tie_word_embeddings=True).config).save_pretrained(folder)
    return chosen_model("llama", LlamaForCausalLM.from_pretrained(folder))


def with_new_head(folder):
    """The head is in the adapter alone."""
    BertModel(tiny_bert().config).save_pretrained(folder)
    return chosen_model("bert", AutoModelForSequenceClassification.from_pretrained(folder))


@pytest.mark.parametrize("make", [fused, without_head, with_new_head])
def test_merge_loads_the_model_where_names_differ(tmp_path, make):
    model = make(tmp_path / "base")
    (tmp_path / "base/tokenizer.txt").write_text("beside the weights")
    move(model)
    model.save_pretrained(tmp_path / "child")
    note = "note: the checkpoint has other names than the model, so the whole model is loaded to {} it.\n"
    output_of("verify", tmp_path / "child", "--base", tmp_path / "base", messages=note.format("check"))
    output_of("merge", tmp_path / "child", tmp_path / "base", tmp_path / "merged", messages=note.format("merge"))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    assert_same(bits(tensors_of(tmp_path / "merged")), bits(tensors_of(tmp_path / "expected")))
    assert (tmp_path / "merged/tokenizer.txt").read_text() == "beside the weights"
    settings = json.loads((tmp_path / "merged/config.json").read_text())
    assert settings["architectures"] == [type(merged).__name__]
    assert not list(tmp_path.glob(".*"))


def test_a_head_that_nobody_has_is_not_made_up(tmp_path):
    LlamaModel(tiny_llama().config).save_pretrained(tmp_path / "base")
    model = chosen_model("llama", LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "child")
    message = error_of("merge", tmp_path / "child", tmp_path / "base", tmp_path / "merged")
    assert "lacks 'lm_head.weight' (1 tensors in all), and the adapter does not have it" in message
    assert not (tmp_path / "merged").exists()


def test_a_model_that_cannot_be_loaded(files, tmp_path):
    build("bert").save_pretrained(tmp_path / "bert")
    for base, problem in (
        (tmp_path / "bert", "does not fit"),
        (tmp_path / "bert/model.safetensors", "must be a folder with 'config.json'"),
    ):
        assert problem in error_of("merge", files / "chosen", base, tmp_path / "merged")
        assert problem in error_of("verify", files / "chosen", "--base", base)
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((tmp_path / "child" / CONFIG_NAME).read_text())
    settings.update(task_type=None, auto_mapping={"base_model_class": "Trainer", "parent_library": "os"})
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps(settings))
    message = error_of("merge", tmp_path / "child", tmp_path / "bert", tmp_path / "merged")
    assert "transformers has no model class 'Trainer'" in message


# Adapters in subfolders


def test_an_adapter_in_a_subfolder(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "repo/runs [1]/last")
    inside = ["--subfolder", "runs [1]/last/"]
    for verb in ("inspect", "verify"):
        whole = output_of(verb, files / "chosen").replace(str(files / "chosen"), str(tmp_path / "repo"))
        assert output_of(verb, tmp_path / "repo", *inside) == whole
    for verb in ("merge", "patch"):
        output_of(verb, files / "chosen", files / "base", tmp_path / f"expected-{verb}")
        output_of(verb, tmp_path / "repo", files / "base", tmp_path / verb, *inside)
        assert content(tmp_path / verb) == content(tmp_path / f"expected-{verb}")
    assert "is no folder of an adapter" in error_of("inspect", tmp_path / "repo", "--subfolder", "none")


# Bad input


def arguments_of(verb, adapter, output, base):
    return {
        "inspect": [adapter],
        "overlap": [adapter, adapter],
        "extract": [base, adapter, output],
        "merge": [adapter, base, output],
        "combine": [output, adapter],
        "patch": [adapter, base, output],
        "verify": [adapter],
    }[verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "There is no file or folder '{}', and it is not a valid name of a repository on the Hub."),
        ("base", "is no folder of an adapter: it has no 'adapter_config.json'"),
        ("lora", "is an adapter of type 'LORA', not of Child-Tuning"),
        ("damaged", "cannot be loaded. The checksum of "),
    ],
)
def test_what_is_no_adapter(files, tmp_path, verb, name, problem):
    if verb == "extract" and name != "missing":
        name, problem = "chosen", "is no safetensors file, and no folder with 'model.safetensors'"
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
            line.startswith("warning: ") and "other weights than the adapter was made on" in line
            for line in result.stderr.splitlines()
        )
        assert result.stderr
        assert (tmp_path / output).exists()
    message = error_of("verify", files / "chosen", "--base", files / "other")
    assert "has other weights than the adapter was made on, such as in 'model.layers" in message


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


WRITERS = ["extract", "merge", "combine", "patch"]


def writing(verb, files, output):
    tuned = files / ("tuned.safetensors" if verb == "extract" else "chosen")
    return [verb, *arguments_of(verb, tuned, output, files / "base")]


@pytest.fixture(params=WRITERS)
def occupied(request, files, tmp_path):
    """A verb's arguments, with an output that exists already, as an earlier call has made it."""
    arguments = writing(request.param, files, tmp_path / "output")
    output_of(*arguments)
    return arguments


def test_nothing_is_overwritten_without_force(occupied, tmp_path):
    before = content(tmp_path / "output")
    assert "exists already; pass --force to replace it." in error_of(*occupied)
    assert content(tmp_path / "output") == before
    output_of(*occupied, "--force")
    assert content(tmp_path / "output") == before
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_what_exists_survives_a_full_disk_and_a_lack_of_permission(occupied, tmp_path, monkeypatch, number):
    before = content(tmp_path / "output")

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number), "a file")

    monkeypatch.setattr("peft_child.files.safetensors_io.write_tensor", fail)
    monkeypatch.setattr("peft_child.files.checkpoint.write_tensor", fail)
    assert os.strerror(number) in error_of(*occupied, "--force")
    assert content(tmp_path / "output") == before
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("verb", WRITERS)
def test_force_does_not_delete_what_is_something_else(files, tmp_path, verb):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/letter").write_text("dear")
    problem = "is a folder; name a file" if verb == "patch" else "is no folder of an adapter or a checkpoint"
    assert problem in error_of(*writing(verb, files, tmp_path / "letters"), "--force")
    assert (tmp_path / "letters/letter").read_text() == "dear"


def test_settings_that_peft_could_not_read(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((files / "chosen" / CONFIG_NAME).read_text())
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps({**settings, "density": 7}))
    assert "density must be a number in (0, 1], got 7" in error_of("verify", tmp_path / "child")
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps({**settings, "child_sizes": None}))
    save_file({"classifier.weight": torch.ones(2)}, tmp_path / "child" / WEIGHTS_NAME)
    assert "holds no child network" in error_of("verify", tmp_path / "child")
    assert json.loads(output_of("inspect", tmp_path / "child", "--json"))["total"]["chosen"] == 0


def test_names_from_a_file_cannot_control_the_terminal(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "child")
    settings = json.loads((files / "chosen" / CONFIG_NAME).read_text())
    settings["base_model_name_or_path"] = "\x1b[2Jbase\nerror: [bold]none"
    (tmp_path / "child" / CONFIG_NAME).write_text(json.dumps(settings))
    assert "base: \\x1b[2Jbase error: [bold]none\n" in output_of("inspect", tmp_path / "child")


# The Hub


@pytest.mark.parametrize("verb", VERBS)
def test_the_hub_out_of_reach(tmp_path, verb):
    message = error_of(verb, *arguments_of(verb, "someone/child", tmp_path / "new", "someone/base"))
    assert message.startswith("error: There is no file or folder 'someone/")
    assert "' here, and the Hub cannot be reached: OfflineModeIsEnabled: " in message


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (GatedRepoError, "is gated: accept its terms on its page, and log in with `hf auth login`"),
        (RevisionNotFoundError, "'someone/child' on the Hub has no revision 'x'"),
        (ConnectionResetError, "it cannot be downloaded from the Hub: ConnectionResetError: two lines"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, problem):
    def refuse(*arguments, **options):
        raise error.__new__(error, "two\nlines") if error is not ConnectionResetError else error("two\nlines")

    monkeypatch.setattr(locate, "snapshot_download", refuse)
    assert problem in error_of("inspect", "someone/child", "--revision", "x")


CLIENT = """
import json, sys
from typer.testing import CliRunner
from peft_child.cli.main import app
results = [CliRunner().invoke(app, arguments) for arguments in json.load(sys.stdin)]
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""


def published(hub, name, *folders, private=False):
    """A repository with one commit, and a tag `v1`, `v2`, and so on, for each folder."""
    repository = hub.repositories[name] = Repository(name, private)
    for number, folder in enumerate(folders, start=1):
        uploaded = {str(path): File(data) for path, data in content(folder).items()}
        unwanted = {"README.md": File(b"unwanted"), "onnx/model.safetensors": File(b"unwanted")}
        repository.tags[f"v{number}"] = repository.commit("main", {**uploaded, **unwanted}, "upload")


def test_the_hub(files, tmp_path):
    commands = [
        ["inspect", "tester/child", "--json"],
        ["inspect", "tester/child", "--json", "--revision", "v1"],
        ["overlap", "tester/child", "tester/child", "--json", "--revision", "v1", "--revision", "v2"],
        ["merge", "tester/child", "tester/base", "merged", "--revision", "v1", "--base-revision", "v1"],
        ["extract", "tester/base", str(files / "tuned.safetensors"), "child", "--base-revision", "v1"],
        ["inspect", "tester/private"],
        ["inspect", "tester/missing"],
        ["inspect", "tester/child", "--revision", "v3"],
        ["inspect", "tester/base"],
        ["inspect", "tester/many", "--json", "--subfolder", "last [1]"],
    ]
    many = tmp_path / "many"
    for name in ("last [1]", "first"):
        shutil.copytree(files / "chosen", many / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with HubServer() as hub:
        published(hub, "tester/base", files / "base", files / "other")
        published(hub, "tester/child", files / "chosen", files / "random")
        published(hub, "tester/private", files / "chosen", private=True)
        published(hub, "tester/many", many)
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **hub.environment(tmp_path / "cache")},
            check=True,
        )
        downloaded = [path for method, path in hub.requests if "/resolve/" in path]
    results = json.loads(done.stdout)
    assert results[-1][2] == ""
    assert [result[0] for result in results] == [0] * 5 + [2] * 4 + [0]
    assert [result[2].count("\n") for result in results] == [0] * 5 + [1] * 4 + [0]
    assert json.loads(results[-1][1])["settings"]["variant"] == "task_driven"
    newest, first, overlap = (json.loads(result[1]) for result in results[:3])
    assert (newest["settings"]["variant"], first["settings"]["variant"]) == ("random", "task_driven")
    assert overlap["pairs"][0]["jaccard"] < 1
    merge_checkpoint(read_adapter(files / "chosen"), Checkpoint(files / "base"), tmp_path / "expected")
    assert content(tmp_path / "merged") == content(tmp_path / "expected")
    settings = read_adapter(tmp_path / "child").settings
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("tester/base", "v1")
    for result, problem in zip(
        results[5:-1],
        [
            "no repository on the Hub that you may read; for a private one log in with `hf auth login`.",
            "no repository on the Hub that you may read",
            "'tester/child' on the Hub has no revision 'v3'.",
            "is no folder of an adapter: it has no 'adapter_config.json'",
        ],
        strict=True,
    ):
        assert problem in result[2]
    assert downloaded
    assert not [path for path in downloaded if re.search("README.md|onnx|first", path)]


def test_the_revision_that_the_adapter_records_is_the_default(files, tmp_path, monkeypatch):
    adapter = read_adapter(files / "chosen")
    adapter.settings.update(base_model_name_or_path="someone/base", revision="v7")
    write_adapter(tmp_path / "child", adapter)
    asked = []

    def download(name, revision, **options):
        asked.append((name, revision))
        return files / "base"

    monkeypatch.setattr(locate, "snapshot_download", download)
    output_of("verify", tmp_path / "child", "--base", "someone/base")
    output_of("verify", tmp_path / "child", "--base", "someone/base", "--base-revision", "v8")
    output_of("verify", tmp_path / "child", "--base", "someone/copy")
    assert asked == [("someone/base", "v7"), ("someone/base", "v8"), ("someone/copy", None)]


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


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(terminal.progress(["a", "b"], "Merging")) == ["a", "b"]
    assert shown.getvalue() == ""
    monkeypatch.setattr(shown, "isatty", lambda: True)
    assert list(terminal.progress(["a", "b"], "Merging")) == ["a", "b"]
    assert "Merging" in shown.getvalue()
