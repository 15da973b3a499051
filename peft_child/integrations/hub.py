"""Pushing an adapter to the Hugging Face Hub together with its model card.

transformers' `push_to_hub` reads the card on the Hub before it saves the adapter, and writes it over the saved one
before it uploads, without a public hook in between. So models that save a Child-Tuning adapter get a `push_to_hub` of
their own, made of the Hub client's public functions; all other models keep that of transformers.
"""

from __future__ import annotations

import functools
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
    """A `push_to_hub` that uploads the model cards of Child-Tuning adapters with them.

    Args:
        push_to_hub: The method of transformers, which is called, with the same arguments, for all other models.

    Returns:
        The method, marked with an attribute `brings_cards`; the given one if it has the mark already.
    """
    if getattr(push_to_hub, "brings_cards", False):
        return push_to_hub

    @functools.wraps(push_to_hub)
    def push(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _push_with_cards if _saves_child_tuning(self) else push_to_hub
        return method(self, *args, **kwargs)

    push.brings_cards = True  # type: ignore[attr-defined]
    return push


def _saves_child_tuning(model: Any) -> bool:
    """Whether a model saves Child-Tuning adapters: as a `PeftModel`, or with transformers' own adapter API.

    The base model inside of a `PeftModel` has `peft_config` as well, but saves only itself.
    """
    saves_adapters = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    return saves_adapters and any(isinstance(config, ChildTuningConfig) for config in model.peft_config.values())


def _push_with_cards(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Save a model's adapters, and upload them with their cards in one commit.

    The arguments are those of transformers' `push_to_hub`. In a card that is on the Hub only the section about the
    child network and the metadata are brought up to date; `tags` are for the card at the top of the repository. If
    nothing changes in the repository, there is no commit, and the last one is returned.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(name, max_shard_size=max_shard_size)
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
        # Without write access one may still open a pull request against a branch that exists.
        if not create_pr or error.response.status_code != 403:
            raise


def _prepare_card(card: Path, path: str, api: HfApi, repo_id: str, revision: str | None, tags: Sequence[str]) -> None:
    """Replace a saved card by the one on the Hub, if there is one, with its section and tags brought up to date."""
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
    except ValueError as error:  # a card that cannot be read is no reason not to push the adapter
        card.unlink()  # so that it does not replace the card on the Hub
        warnings.warn(f"The adapter is pushed, but the card on the Hub is left as it is. {error}", stacklevel=4)


def _read_from_hub(api: HfApi, repo_id: str, path: str, revision: str | None) -> bytes | None:
    """The content of a file on the Hub, or None if it does not exist."""
    try:
        # Without force_download, a cached and maybe older file would be returned when the network fails.
        return Path(api.hf_hub_download(repo_id, path, revision=revision, force_download=True)).read_bytes()
    except RemoteEntryNotFoundError:
        return None
