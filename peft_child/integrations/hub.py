"""Pushing an adapter to the Hugging Face Hub together with its model card.

transformers reads the card that is on the Hub before an adapter is saved, and writes it over the saved one before the
upload, with nothing public in between. So for models that save a Child-Tuning adapter another method stands in, made
of the Hub client's public functions; overriding the private upload would see only what transformers made of the card.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from peft import PeftModel

from peft_child.card.model_card import CARD_NAME, HEAT_MAP_NAME, completed_card, tagged_card
from peft_child.files.adapter_folder import CONFIG_NAME
from peft_child.tuner.config import ChildTuningConfig


def bringing_cards(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    """A `push_to_hub` that brings the model cards of Child-Tuning adapters up.

    Args:
        push_to_hub: The method of transformers, which is called for everything else. Its arguments are taken.

    Returns:
        The method, with `brings_cards` as a mark; the given one if it has the mark already.
    """
    if getattr(push_to_hub, "brings_cards", False):
        return push_to_hub
    signature = inspect.signature(push_to_hub)

    @functools.wraps(push_to_hub)
    def push(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _saves_child_tuning(self):
            return push_to_hub(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        return push_with_cards(*given.args, **given.kwargs)

    push.brings_cards = True  # type: ignore[attr-defined]
    return push


def _saves_child_tuning(model: Any) -> bool:
    """Whether a model saves Child-Tuning adapters; the base model of a `PeftModel` knows of them, but saves itself."""
    saves_adapters = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    return saves_adapters and any(isinstance(config, ChildTuningConfig) for config in model.peft_config.values())


def push_with_cards(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    **options: Any,
) -> CommitInfo:
    """Save a model's adapters, and upload them with their cards in one commit.

    A card that is on the Hub stays as it is outside of the section about the child network, which is written anew. A
    repository in which nothing would change gets no commit.

    Args:
        model: A model with a Child-Tuning adapter.
        repo_id: The repository, which is made if there is none.
        commit_message: The first line of the commit's message.
        commit_description: The rest of the message.
        private: Whether a new repository is private; by default the owner's settings decide.
        token: A token for the Hub, or whether to use the stored one.
        revision: The branch to commit to, which is made if there is none; by default the main branch.
        create_pr: Whether to open a pull request instead.
        tags: Tags for the front matter of the card at the top of the repository, besides those it has.
        options: Further arguments for the model's `save_pretrained`.

    Returns:
        The commit, or the last one if nothing has changed.

    Raises:
        RuntimeError: If no child network was chosen.
        HfHubHTTPError: If the Hub refuses it; without a network the client's own errors pass through as well.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(name, **options)
        if revision is not None and not revision.startswith("refs/pr"):
            _make_branch(api, repo_id, revision, create_pr)
        for card in sorted(folder.rglob(CARD_NAME)):
            _prepare_card(card, card.relative_to(folder).as_posix(), api, repo_id, revision, tags or ())
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return api.create_commit(  # `upload_folder` may make several
            repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _make_branch(api: HfApi, repo_id: str, name: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=name, exist_ok=True)
    except HfHubHTTPError as error:
        # who may only open pull requests can still name a branch that there is
        if not create_pr or error.response.status_code != 403:
            raise


def _prepare_card(card: Path, path: str, api: HfApi, repo_id: str, revision: str | None, tags: Sequence[str]) -> None:
    """Put the card that is on the Hub, if any, in the place of a saved one, and write in it what it has to say."""
    name = f"{repo_id}/{path}"
    on_hub = _read_from_hub(api, repo_id, path, revision)
    try:
        text = (card.read_bytes() if on_hub is None else on_hub).decode("utf-8-sig")
        settings = card.with_name(CONFIG_NAME)
        if on_hub is not None and settings.exists():
            has_heat_map = card.with_name(HEAT_MAP_NAME).exists()
            text = completed_card(text, json.loads(settings.read_text()), has_heat_map, name)
        if path == CARD_NAME and tags:
            text = tagged_card(text, tags, name)
        card.write_bytes(text.encode())
    except ValueError as error:  # no reason to hold an adapter back
        card.unlink()
        warnings.warn(f"The adapter is pushed, but the card on the Hub stays as it is. {error}", stacklevel=4)


def _read_from_hub(api: HfApi, repo_id: str, path: str, revision: str | None) -> bytes | None:
    """A file on the Hub, or nothing if it is not there."""
    try:
        # not from the cache, where an older one would do if the network fails
        return Path(api.hf_hub_download(repo_id, path, revision=revision, force_download=True)).read_bytes()
    except RemoteEntryNotFoundError:
        return None
