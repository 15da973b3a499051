"""Checkpoints in one file or several, read by name and replaced as a whole."""

import pytest

from peft_child.files.checkpoint import replacing


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
