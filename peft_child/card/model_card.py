"""The model card of a saved adapter: a section about its child network in the README.md beside it.

The section stands between two markers and is replaced at every save. The text outside of them belongs to the author
and is never changed, except for a template that nobody has filled in, which is removed. The metadata at the head of
the card (its front matter) is written only if something in it changes, by huggingface_hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from peft_child.card.plot import draw_child_network, grouped
from peft_child.tensors.delta import ChildSize, total_size


CARD_NAME = "README.md"
HEAT_MAP_NAME = "child_network.png"
BEGIN = "<!-- peft-child:begin -->"
END = "<!-- peft-child:end -->"
SECTION = re.compile(f"{BEGIN}(?:(?!{BEGIN}|{END}).)*{END}", re.DOTALL)
TAGS = ("child-tuning", "peft-child")
VERSIONS = "### Framework versions"  # PEFT adds this block to every card that lacks it
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)

# Lines that libraries put into a blank template.
AUTOMATIC = re.compile(rf"\s*|{VERSIONS}|- PEFT \S+|This is the model card of a .* has been automatically generated\.")

VARIANT_TEXTS = {
    "task_driven": "the entries with the largest Fisher information on the task (Child-Tuning_D)",
    "random": "a fixed random choice",
    "task_free": "every weight, through random gradient masks (Child-Tuning_F)",
    "extracted": "taken from checkpoints, from other adapters, or from a dense change",
}
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

INTRODUCTION = """\
## Child-Tuning adapter

Child-Tuning fine-tunes a *child network*, usually a small and fixed part of the weights of a pretrained model, and
leaves all other weights as they are. This adapter holds the positions of the child network in the base model and what
training added there; loading or merging it gives the fine-tuned model.

Runxin Xu, Fuli Luo, Zhiyuan Zhang, Chuanqi Tan, Baobao Chang, Songfang Huang and Fei Huang: [Raise a Child in Large
Language Model: Towards Effective and Generalizable Fine-tuning](https://aclanthology.org/2021.emnlp-main.749),
EMNLP 2021."""

LOADING = """\
### How to load it

```bash
pip install peft-child
```

```python
import peft_child  # registers the method with PEFT
from peft import PeftModel
{imports}
base = {base}
model = PeftModel.from_pretrained(base, "...")  # the name of this repository, or a folder with its files
```"""

TABLE_HEAD = """\
### Where it is

| module | tensors | chosen entries | share of their entries |
|---|--:|--:|--:|"""

REMINDER = """\
<!--
Write here: text outside the two markers above is kept when the adapter is saved again. Worth mentioning: the data that
the child network was trained on, its results compared with the base model's, its intended use and its limits.
`license` and `language` belong in the front matter at the top.
-->"""


def complete_card(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Write the section about the child network into the model card of a folder, and its heat map beside it.

    The card is made if there is none. The heat map needs matplotlib; without it the card does not mention one.

    Args:
        folder: A folder with a saved adapter.
        settings: What its `adapter_config.json` holds, `child_sizes` included; other settings may be missing.

    Raises:
        ValueError: If the front matter of the card cannot be read.
    """
    path = Path(folder) / CARD_NAME
    card = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
    try:
        draw_child_network(_sizes(settings), path.with_name(HEAT_MAP_NAME))
        has_heat_map = True
    except ImportError:
        has_heat_map = False
    path.write_bytes(completed_card(card, settings, has_heat_map, str(path)).encode())


def completed_card(card: str, settings: Mapping[str, Any], has_heat_map: bool, name: str) -> str:
    """A model card with a new section about the child network.

    Args:
        card: The whole card, which may be empty.
        settings: As for `complete_card`.
        has_heat_map: Whether the heat map is beside the card.
        name: The card's name in error messages.

    Raises:
        ValueError: If the front matter of the card cannot be read.
    """
    front, body = _with_metadata(card, lambda data: _describe(data, settings), name)
    return front + _with_section(body, settings, has_heat_map)


def tagged_card(card: str, tags: Iterable[str], name: str) -> str:
    """A model card with these tags in its front matter, besides those it has.

    Args:
        card: The whole card.
        tags: The tags to add.
        name: The card's name in error messages.

    Raises:
        ValueError: If the front matter of the card cannot be read.
    """
    return "".join(_with_metadata(card, lambda data: _tag(data, tags), name))


def _sizes(settings: Mapping[str, Any]) -> dict[str, ChildSize]:
    return {name: ChildSize(*size) for name, size in settings["child_sizes"].items()}


# Front matter


def _with_metadata(card: str, change: Callable[[ModelCardData], None], name: str) -> tuple[str, str]:
    """Front matter and text of a card; the front matter is written anew only if `change` changes what it says."""
    if not REGEX_YAML_BLOCK.search(card):
        card = f"---\n\n---\n{card}"  # huggingface_hub would warn
    try:
        parsed: Any = ModelCard(card)
        before = parsed.data.to_dict()
        change(parsed.data)
        written = card if parsed.data.to_dict() == before else str(parsed)
    except Exception as error:  # YAML errors, and whatever the fields of the metadata raise
        reason = " ".join(str(error).split())
        raise ValueError(f"The front matter of '{name}' must be a model card's metadata: {reason}") from error
    return written.removesuffix(parsed.text), parsed.text


def _describe(data: ModelCardData, settings: Mapping[str, Any]) -> None:
    base = settings.get("base_model_name_or_path") or ""
    if _is_repo_id(base):
        data.base_model = data.base_model or base
    else:  # the Hub refuses cards that name a folder
        data.base_model = None if data.base_model in ("", base) else data.base_model
        data.tags = [tag for tag in data.tags or [] if tag != f"base_model:adapter:{base}"]
    data.library_name = "peft"
    _tag(data, TAGS)


def _tag(data: ModelCardData, tags: Iterable[str]) -> None:
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))


def _is_repo_id(base: str) -> bool:
    """Whether a base model was loaded by its name on the Hub, not from a folder."""
    return REPO_ID.fullmatch(base) is not None and not Path(base).is_dir()


# Text


def _with_section(body: str, settings: Mapping[str, Any], has_heat_map: bool) -> str:
    """The text with the section in place of the old one or of an unfilled template, else at the end.

    The section ends without a line break, since PEFT strips the end of the card at the next save.
    """
    section = f"{BEGIN}\n\n{_section(settings, has_heat_map)}\n\n{END}"
    old = SECTION.search(body)
    if old:
        return body[: old.start()] + section + body[old.end() :]
    if _is_unfilled(body):
        versions = body[body.index(VERSIONS) :] if VERSIONS in body else ""
        base = settings.get("base_model_name_or_path") or ""
        title = f"# Child network of {base}" if _is_repo_id(base) else "# Child network"
        return "\n" + "\n\n".join(filter(None, [title, section, REMINDER, versions]))
    return body + ("\n" if body.endswith("\n") else "\n\n") + section


def _is_unfilled(body: str) -> bool:
    """Whether a text is empty, or a template as PEFT and transformers write it."""

    def lines_of(text: str) -> list[str]:
        return [line for line in text.splitlines() if not AUTOMATIC.fullmatch(line)]

    return lines_of(body) in ([], lines_of(ModelCard.from_template(ModelCardData()).text))


def _public(base: str | None) -> str | None:
    """The name of a base model on the Hub; of a folder its own name alone, since the rest belongs to one machine."""
    return base if not base or _is_repo_id(base) else Path(base).name


def _section(settings: Mapping[str, Any], has_heat_map: bool) -> str:
    sizes = _sizes(settings)
    kinds = grouped(sizes, lambda place: place.kind)
    rows = [_row(_code(kind).replace("|", "\\|"), group) for kind, group in kinds.items()]
    table = "\n".join([TABLE_HEAD, *rows, _row("all", list(sizes.values()))])
    parts = [INTRODUCTION, _loading(settings), _facts(settings, sizes), table]
    if has_heat_map:
        parts.append(f"![Share of chosen entries by layer and module]({HEAT_MAP_NAME})")
    return "\n\n".join(parts)


def _loading(settings: Mapping[str, Any]) -> str:
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    mapping = settings.get("auto_mapping") or {}
    kind = AUTO_CLASSES.get(settings.get("task_type") or "")
    if kind is None and str(mapping.get("parent_library")).startswith("transformers."):
        kind = mapping["base_model_class"]
    if kind is None or not name:
        return LOADING.format(imports="", base="...  # the base model")
    arguments = _quoted(_public(name)) + (f", revision={_quoted(revision)}" if revision else "") + _labels(settings)
    return LOADING.format(imports=f"from transformers import {kind}\n", base=f"{kind}.from_pretrained({arguments})")


def _labels(settings: Mapping[str, Any]) -> str:
    """The classes of a classifier as arguments of `from_pretrained`."""
    labels = settings.get("labels") or []
    if labels == [f"LABEL_{number}" for number in range(len(labels))]:
        return f", num_labels={len(labels)}" if labels else ""
    named = ", ".join(f"{number}: {_quoted(label)}" for number, label in enumerate(labels))
    return f", id2label={{{named}}}"


def _facts(settings: Mapping[str, Any], sizes: Mapping[str, ChildSize]) -> str:
    variant, whole = settings.get("variant"), total_size(sizes.values())
    facts = {
        "Base model": _code(_public(settings.get("base_model_name_or_path"))),
        "Revision": _code(settings.get("revision")),
        "Variant": variant and f"{_code(variant)}, {VARIANT_TEXTS.get(variant, 'of a later version')}",
        "Density": variant in ("task_driven", "random") and f"{settings.get('density')} of all targeted entries",
        "Granularity": settings.get("granularity") == "input_channel" and "whole input channels",
        "Gradient mask": _gradient_mask(settings),
        "Fisher information": variant == "task_driven" and _fisher(settings),
        "Seed": variant in ("random", "task_free") and str(settings.get("seed", "")),
        "Chosen entries": (
            f"{whole.chosen:,} in {len(sizes)} tensors, {100 * whole.density:.3g} % of their {whole.numel:,} entries; "
            "targeted tensors without any are not counted"
        ),
        "Stored in": _code(settings.get("delta_dtype")),
        "Trained and saved whole": ", ".join(map(_code, settings.get("modules_to_save") or [])),
    }
    return "### Settings\n\n" + "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items() if fact)


def _gradient_mask(settings: Mapping[str, Any]) -> str:
    density = settings.get("density" if settings.get("variant") == "task_free" else "gradient_density") or 1
    every = settings.get("resample_every") or 1
    often = "at every optimizer step" if every == 1 else f"every {every} optimizer steps"
    return f"each gradient kept with probability {density}, drawn anew {often}" if density < 1 else ""


def _fisher(settings: Mapping[str, Any]) -> str:
    examples = settings.get("fisher_examples")
    return _code(settings.get("fisher")) + (f", estimated on {examples:,} examples" if examples else "")


def _row(name: str, sizes: Sequence[ChildSize]) -> str:
    whole = total_size(sizes)
    return f"| {name} | {len(sizes)} | {whole.chosen:,} | {100 * whole.density:.3g} % |"


def _code(value: object) -> str:
    """A setting as code in a line of Markdown, whatever its characters; empty if it is not set."""
    return f"`{_plain(str(value)).replace('`', chr(39))}`" if value else ""


def _quoted(value: object) -> str:
    """A setting as a string in Python code."""
    return json.dumps(_plain(str(value)))


def _plain(text: str) -> str:
    """The text in one line, and nothing in it that could end the section or open a comment."""
    return " ".join(text.split()).replace("<!--", "<!")
