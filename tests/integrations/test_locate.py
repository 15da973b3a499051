"""Folders, and names on the Hub, with revisions and subfolders."""

import pytest
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from peft_child.integrations import locate


@pytest.mark.parametrize("find", [locate.locate_adapter, locate.locate_checkpoint])
@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (GatedRepoError, "is gated: accept its terms on its page, and log in with `hf auth login`"),
        (RevisionNotFoundError, "'someone/child' on the Hub has no revision 'x'"),
        (ConnectionResetError, "it cannot be downloaded from the Hub: ConnectionResetError: two\nlines"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, find, error, problem):
    def refuse(*arguments, **options):
        raise error.__new__(error, "two\nlines") if error is not ConnectionResetError else error("two\nlines")

    monkeypatch.setattr(locate, "snapshot_download", refuse)
    with pytest.raises(OSError, match="someone/child") as refused:
        find("someone/child", "x")
    assert problem in str(refused.value)


def test_a_path_comes_first_and_the_cache_is_passed_on(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(locate, "snapshot_download", lambda name, **options: asked.append((name, options)) or "found")
    assert locate.locate_checkpoint(str(tmp_path)) == tmp_path
    assert str(locate.locate_checkpoint("someone/base", "v1", cache="downloads")) == "found"
    assert str(locate.locate_adapter("someone/child", subfolder="last")) == "found/last"
    ((base, options), (adapter, others)) = asked
    assert (base, options["revision"], options["cache_dir"]) == ("someone/base", "v1", "downloads")
    assert (adapter, others["cache_dir"]) == ("someone/child", None)
    assert others["allow_patterns"] == ["last/adapter_config.json", "last/adapter_model.safetensors"]
