"""No output replaces anything unasked, and none an input."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from .commands import content, error_of, output_of, writing


WRITERS = ["extract", "merge", "combine", "patch"]


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
    problem = "is a folder; name a file" if verb == "patch" else "is not the folder of an adapter or a checkpoint"
    assert problem in error_of(*writing(verb, files, tmp_path / "letters"), "--force")
    assert (tmp_path / "letters/letter").read_text() == "dear"


@pytest.fixture
def base(files, tmp_path):
    return Path(shutil.copytree(files / "base", tmp_path / "base"))


@pytest.fixture
def child(files, tmp_path):
    return Path(shutil.copytree(files / "chosen", tmp_path / "child"))


@pytest.fixture
def tuned(base, files, tmp_path):
    """The fine-tuned base as a folder."""
    folder = Path(shutil.copytree(base, tmp_path / "tuned"))
    shutil.copy(files / "tuned.safetensors", folder / "model.safetensors")
    return folder


def test_an_output_is_never_an_input(base, tuned, child):
    before = content(base), content(tuned), content(child)
    for command in (
        ("patch", child, base, base / "model.safetensors"),
        ("patch", child, base, child / "adapter_model.safetensors"),
        ("merge", child, base, base),
        ("merge", child, base, child),
        ("extract", base, tuned, tuned),
        ("combine", child, child),
        ("inspect", child, "--plot", child / "adapter_model.safetensors"),
        ("inspect", child, "--html", child / "adapter_model.safetensors"),
    ):
        assert "name another output" in error_of(*command, "--force")
    (base / "part").mkdir()
    (base / "part/config.json").write_text("{}")
    assert "name another output" in error_of("merge", child, base, base / "part", "--force")
    shutil.rmtree(base / "part")
    link = base.parent / "link"
    link.symlink_to(base)
    assert "name another output" in error_of("merge", child, link, base, "--force")
    assert before == (content(base), content(tuned), content(child))


def test_an_output_is_no_file_that_an_input_links_to(base, child, tmp_path):
    stored, folder = tmp_path / "blobs/weights", tmp_path / "snapshot"
    stored.parent.mkdir()
    shutil.copytree(base, folder)
    shutil.move(folder / "model.safetensors", stored)
    (folder / "model.safetensors").symlink_to(stored)
    for output in (stored, folder / "model.safetensors"):
        assert "name another output" in error_of("patch", child, folder, output, "--force")
    assert content(folder) == content(base)
    assert (folder / "model.safetensors").is_symlink()
