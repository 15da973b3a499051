"""The command line with names on the Hub, revisions and subfolders."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from peft_child.files.adapter_folder import read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import merge_checkpoint
from peft_child.integrations import locate

from ..hubserver import File, HubServer, Repository
from .commands import VERBS, arguments_of, content, error_of, output_of


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
    assert "is not an adapter folder" in error_of("inspect", tmp_path / "repo", "--subfolder", "none")


@pytest.mark.parametrize("verb", VERBS)
def test_the_hub_out_of_reach(tmp_path, verb):
    message = error_of(verb, *arguments_of(verb, "someone/child", tmp_path / "new", "someone/base"))
    assert message.startswith("error: There is no file or folder 'someone/")
    assert "' here, and the Hub cannot be reached: OfflineModeIsEnabled: " in message


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
            "is not an adapter folder: it has no 'adapter_config.json'",
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


CLIENT = """
import json, sys
from typer.testing import CliRunner
from peft_child.cli.main import app
results = [CliRunner().invoke(app, arguments) for arguments in json.load(sys.stdin)]
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""
