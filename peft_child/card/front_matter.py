"""The metadata at the head of a model card, changed entry by entry: other lines stay as they are, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK


def front_and_body(card: str, describe: Callable[[ModelCardData], None], name: str) -> tuple[str, str]:
    """The front matter, in which only what `describe` changes is written anew, and the text after it.

    Args:
        card: The whole card, which may be empty.
        describe: Changes the metadata in place.
        name: What errors call the card.

    Raises:
        ValueError: If the front matter cannot be read.
    """
    if not REGEX_YAML_BLOCK.search(card):
        card = f"---\n\n---\n{card}"
    try:
        parsed = ModelCard(card)
        data: Any = parsed.data
        written = data.to_dict()
        describe(data)
    except Exception as error:  # the parsers raise whatever comes
        reason = " ".join(str(error).split())
        raise ValueError(f"The front matter of '{name}' must be a model card's metadata: {reason}") from error
    body: str = parsed.text
    said = data.to_dict()
    changes = {key: value for key, value in said.items() if written.get(key) != value}
    edited = _with_keys(card[: len(card) - len(body)], changes)
    if not _says(edited, said):  # an entry is gone, or written in an unusual way
        whole = str(parsed)
        edited = whole[: len(whole) - len(body)]
    return edited, body


def _with_keys(front: str, values: Mapping[str, Any]) -> str:
    """Front matter with these entries, each in place of the old one or at the end; other lines stay as they are."""
    block = cast(re.Match[str], REGEX_YAML_BLOCK.search(front))
    text, line_break = block[2], "\r\n" if "\r\n" in block[1] else "\n"
    for key, value in values.items():
        entry = ModelCardData(**{key: value}).to_yaml(line_break=line_break)
        old = re.search(rf"^(['\"]?){re.escape(key)}\1[ \t]*:[^\r\n]*(\r?\n[ \t-][^\r\n]*)*", text, re.MULTILINE)
        parts = [text[: old.start()], entry, text[old.end() :]] if old else [text, text and line_break, entry]
        text = "".join(parts)
    return front[: block.start(2)] + text + front[block.end(2) :]


def _says(front: str, said: dict[str, Any]) -> bool:
    try:
        data: Any = ModelCard(front).data
        return bool(data.to_dict() == said)
    except Exception:  # the parsers raise whatever comes
        return False
