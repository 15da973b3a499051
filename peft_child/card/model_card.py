"""The model card of a saved adapter: a section about its child network in the README.md beside it.

The section stands between two markers and is written anew at every save. What the author wrote outside of them stays
as it is, byte for byte; only a template that nobody has filled in gives way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_child.card.front_matter import front_and_body
from peft_child.card.plot import Share, draw_child_network, shares_by_kind, total
from peft_child.tensors.delta import ChildSize


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
import peft_child  # makes PEFT know the method
from peft import PeftModel
{imports}
base = {base}
model = PeftModel.from_pretrained(base, "...")  # the name of this repository, or a folder with its files
```"""

REMINDER = """\
<!--
Yours to write: all text outside the two markers above stays when the adapter is saved again. Worth telling: the data
that the child network was trained on, its results beside those of the base model, what it is meant for and what not.
`license` and `language` belong into the front matter at the top.
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
    has_heat_map = _draw(_sizes(settings), path.with_name(HEAT_MAP_NAME))
    path.write_bytes(completed_card(card, settings, has_heat_map, str(path)).encode())


def completed_card(card: str, settings: Mapping[str, Any], has_heat_map: bool, name: str) -> str:
    """A model card with a new section about the child network.

    Args:
        card: The whole card, which may be empty.
        settings: As for `complete_card`.
        has_heat_map: Whether the heat map is beside the card.
        name: What errors call the card.

    Raises:
        ValueError: If the front matter of the card cannot be read.
    """
    front, body = front_and_body(card, partial(_describe, settings=settings), name)
    return front + _with_section(body, settings, has_heat_map)


def tagged_card(card: str, tags: Iterable[str], name: str) -> str:
    """A model card with these tags in its front matter, besides those it has.

    Args:
        card: The whole card.
        tags: The tags to add.
        name: What errors call the card.

    Raises:
        ValueError: If the front matter of the card cannot be read.
    """
    front, body = front_and_body(card, partial(_tag, tags=tags), name)
    return front + body


def _sizes(settings: Mapping[str, Any]) -> dict[str, ChildSize]:
    return {name: ChildSize(*size) for name, size in settings["child_sizes"].items()}


def _draw(sizes: Mapping[str, ChildSize], path: Path) -> bool:
    try:
        draw_child_network(sizes, path)
    except ImportError:
        return False
    return True


# Front matter


def _describe(data: ModelCardData, settings: Mapping[str, Any]) -> None:
    base = settings.get("base_model_name_or_path") or ""
    tags = list(data.tags or [])
    if _is_repo_id(base):
        data.base_model = data.base_model or base
    else:  # the Hub refuses cards that name a folder
        data.base_model = None if data.base_model in ("", base) else data.base_model
        tags = [tag for tag in tags if tag != f"base_model:adapter:{base}"]
    data.library_name = "peft"
    data.tags = tags
    _tag(data, TAGS)


def _tag(data: ModelCardData, tags: Iterable[str]) -> None:
    known = data.tags or []
    data.tags = list(dict.fromkeys([*known, *tags])) or None


def _is_repo_id(base: str) -> bool:
    """Whether a base model was loaded by its name on the Hub, not from a folder."""
    return REPO_ID.fullmatch(base) is not None and not Path(base).is_dir()


# Text


def _with_section(body: str, settings: Mapping[str, Any], has_heat_map: bool) -> str:
    """The text with a new section in place of the old one, or of an unfilled template, or else behind it.

    Nothing is put behind the last line, not even a line break, because PEFT would take it away at the next save.
    """
    section = f"{BEGIN}\n\n{_section(settings, has_heat_map)}\n\n{END}"
    old = SECTION.search(body)
    if old:
        return body[: old.start()] + section + body[old.end() :]
    if _is_unfilled(body):
        versions = body[body.index(VERSIONS) :] if VERSIONS in body else ""
        return "\n" + "\n\n".join(filter(None, [_title(settings), section, REMINDER, versions]))
    return body + ("\n" if body.endswith("\n") else "\n\n") + section


def _is_unfilled(body: str) -> bool:
    """Whether a text is empty, or a template as PEFT and transformers write it."""
    text, template = (
        [line for line in lines.splitlines() if not AUTOMATIC.fullmatch(line)]
        for lines in (body, ModelCard.from_template(ModelCardData()).text)
    )
    return not text or text == template


def _title(settings: Mapping[str, Any]) -> str:
    base = settings.get("base_model_name_or_path") or ""
    return f"# Child network of {base}" if _is_repo_id(base) else "# Child network"


def _section(settings: Mapping[str, Any], has_heat_map: bool) -> str:
    sizes = _sizes(settings)
    parts = [INTRODUCTION, _loading(settings), _facts(settings, sizes), _table(sizes)]
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
    arguments = _quoted(name) + (f", revision={_quoted(revision)}" if revision else "")
    return LOADING.format(imports=f"from transformers import {kind}\n", base=f"{kind}.from_pretrained({arguments})")


def _facts(settings: Mapping[str, Any], sizes: Mapping[str, ChildSize]) -> str:
    variant = settings.get("variant")
    whole = total(shares_by_kind(sizes).values())
    facts = {
        "Base model": _code(settings.get("base_model_name_or_path")),
        "Revision": _code(settings.get("revision")),
        "Variant": variant and f"{_code(variant)}, {VARIANT_TEXTS.get(variant, 'of a later version')}",
        "Density": f"{settings.get('density')} of all targeted entries"
        if variant in ("task_driven", "random")
        else "",
        "Gradient mask": _gradient_mask(settings),
        "Fisher information": _fisher(settings) if variant == "task_driven" else "",
        "Seed": str(settings.get("seed", "")) if variant in ("random", "task_free") else "",
        "Chosen entries": (
            f"{whole.chosen:,} in {whole.tensors} tensors, {whole.percent:.3g} % of their {whole.numel:,} entries; "
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


def _table(sizes: Mapping[str, ChildSize]) -> str:
    shares = shares_by_kind(sizes)
    rows = [_row(_code(kind).replace("|", "\\|"), share) for kind, share in shares.items()]
    head = [
        "### Where it is",
        "",
        "| module | tensors | chosen entries | share of their entries |",
        "|---|--:|--:|--:|",
    ]
    return "\n".join([*head, *rows, _row("all", total(shares.values()))])


def _row(name: str, share: Share) -> str:
    return f"| {name} | {share.tensors} | {share.chosen:,} | {share.percent:.3g} % |"


def _code(value: object) -> str:
    """A setting as code in a line of Markdown, whatever its characters; nothing for nothing."""
    return f"`{_plain(str(value)).replace('`', chr(39))}`" if value else ""


def _quoted(value: object) -> str:
    """A setting as a string in Python code."""
    return json.dumps(_plain(str(value)))


def _plain(text: str) -> str:
    """One line that cannot be taken for a marker."""
    return " ".join(text.split()).replace("<!--", "<!")
