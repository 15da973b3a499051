"""Finds adapters and checkpoints: local folders first, then repositories on the Hugging Face Hub.

Every error of the Hub becomes an OSError with one sentence that says what to do.
"""

from __future__ import annotations

from glob import escape
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_child.card.model_card import REPO_ID
from peft_child.files.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from peft_child.files.checkpoint import CHECKPOINT_NAME, DESCRIBING, INDEX_NAME, LICENCES


WEIGHTS_FILES = (CHECKPOINT_NAME, INDEX_NAME, "model-*-of-*.safetensors")


def locate_adapter(
    name: str, revision: str | None = None, token: str | None = None, subfolder: str | None = None
) -> Path:
    """Find the folder of an adapter, downloading it from the Hub if it is not a local path.

    Args:
        name: A path, or the name of a repository on the Hub. A path that exists is preferred.
        revision: Branch, tag or commit on the Hub; by default the repository's main branch.
        token: Access token for the Hub; by default that of the environment or of `hf auth login`.
        subfolder: Where the adapter is in the folder or the repository, if not at the top level.

    Returns:
        The path itself, or the folder in the Hub's cache, followed by the subfolder.

    Raises:
        OSError: If there is no such path, and the repository cannot be downloaded; the message says why.
    """
    inside = PurePosixPath(subfolder or "")
    return (
        _locate(name, revision, token, [escape(str(inside / file)) for file in (CONFIG_NAME, WEIGHTS_NAME)]) / inside
    )


def locate_checkpoint(
    name: str, revision: str | None = None, token: str | None = None, cache: str | None = None
) -> Path:
    """Find the folder or file of a checkpoint, with the files beside its weights; otherwise as `locate_adapter`.

    `cache` is the folder of downloads, by default that of `huggingface_hub`.
    """
    # Nothing in subfolders: the Hub's patterns let `*` match a slash as well.
    return _locate(name, revision, token, [*WEIGHTS_FILES, *DESCRIBING, *LICENCES], ["*/*"], cache)


def _locate(
    name: str,
    revision: str | None,
    token: str | None,
    patterns: list[str],
    ignored: list[str] | None = None,
    cache: str | None = None,
) -> Path:
    if Path(name).exists():
        return Path(name)
    if not REPO_ID.fullmatch(name):
        raise FileNotFoundError(
            f"There is no file or folder '{name}', and it is not a valid name of a repository on the Hub."
        )
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except Exception as error:  # errors of the client's HTTP library have no common class of their own
        raise OSError(_hub_error(name, revision, error)) from error
    return Path(folder)


def _hub_error(name: str, revision: str | None, error: Exception) -> str:
    start = f"There is no file or folder '{name}' here, and"
    if isinstance(error, GatedRepoError):
        return f"{start} on the Hub it is gated: accept its terms on its page, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"{start} no repository on the Hub that you may read; for a private one log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"'{name}' on the Hub has no revision '{revision}'."
    if isinstance(error, HFValidationError):
        return f"{start} it is not a valid name of a repository on the Hub."
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__ or error  # what happened; the client's own text is about its cache
        return f"{start} the Hub cannot be reached: {type(cause).__name__}: {cause}"
    if isinstance(error, HfHubHTTPError):
        return f"{start} the Hub refused it: {error}"
    return f"{start} it cannot be downloaded from the Hub: {type(error).__name__}: {error}"
