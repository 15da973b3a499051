"""Base models that transformers has to load: their class, and merging where a checkpoint has other tensor names.

transformers renames and fuses tensors of some architectures on loading, so an adapter's parameters cannot be found in
the checkpoint. Then the whole model is loaded, which takes as much memory as it is large.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers.utils import logging

from peft_child.card.model_card import AUTO_CLASSES
from peft_child.files.adapter_folder import SparseAdapter, classes_of, open_adapter
from peft_child.files.adapter_tensors import PREFIX
from peft_child.files.checkpoint import copy_description, read_config, replacing


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def merge_by_loading(adapter: Path, base: Path, folder: Path, force: bool = False) -> None:
    """Write a checkpoint with the adapter merged, by `merge_and_unload()` and `save_pretrained()`.

    Args:
        adapter: Folder of the adapter.
        base: Folder of its base model; what lies beside the weights is copied.
        folder: The folder to make.
        force: Replace a folder that exists.

    Raises:
        FileExistsError: If the folder exists and `force` is not set.
        ValueError: If the model cannot be loaded, or the adapter does not fit.
    """
    with replacing(folder, force) as temporary, _quiet():
        model: Any = load_with_adapter(adapter, base)
        temporary.mkdir()
        copy_description(base, temporary)
        model.merge_and_unload().save_pretrained(temporary)


def load_with_adapter(adapter: Path, base: Path, check_base: str = "warn") -> PeftModel:
    """Load a base model with an adapter, in the class that the adapter was made for.

    Args:
        adapter: Folder of the adapter.
        base: Folder of its base model.
        check_base: What to do if the base has other weights than the adapter was made on: 'warn', 'error' or 'off'.

    Raises:
        ValueError: If the class is unknown, the adapter does not fit, or the model needs a tensor that neither has.
    """
    stored = open_adapter(adapter)
    model_class = _model_class(stored.settings, base)
    head = _head_of(stored)
    with _quiet():
        model, info = model_class.from_pretrained(
            base,
            **{"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True},
            **head,
            ignore_mismatched_sizes=bool(head),  # the head of the checkpoint may tell other classes apart
        )
    try:
        loaded = PeftModel.from_pretrained(model, adapter, check_base=check_base)
    except RuntimeError as error:
        raise ValueError(f"The adapter in '{adapter}' does not fit '{base}': {error}") from error
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    missing = sorted(name for name in absent if f"{PREFIX}{name}" not in stored.dense)
    if missing:
        raise ValueError(
            f"'{base}' lacks '{missing[0]}' ({len(missing)} tensors in all), and the adapter does not have it: "
            f"loaded as {type(model).__name__}, the model would have random values there."
        )
    return loaded


def load_without_memory(settings: Mapping[str, Any], base: Path) -> Any:
    """A base model whose parameters have names and shapes, and no values.

    Raises:
        ValueError: If the class of the model is unknown.
    """
    model_class = _model_class(settings, base)
    with _quiet():
        return model_class.from_pretrained(base, device_map="meta", use_safetensors=True, trust_remote_code=False)


def _head_of(adapter: SparseAdapter) -> dict[str, Any]:
    """The settings with which transformers makes a head like that of an adapter; it records no labels if it is old."""
    endings = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
    rows = [len(tensor) for name, tensor in adapter.dense.items() if name.endswith(endings)]
    return classes_of(adapter.settings) or ({"num_labels": rows[0]} if rows else {})


def _model_class(settings: Mapping[str, Any], base: Path) -> Any:
    """The class for the adapter's task, else the class it was made on, else the class that saved the checkpoint."""
    if not (base / "config.json").is_file():
        raise ValueError(f"To be loaded as a model, '{base}' must be a folder with 'config.json'.")
    task = AUTO_CLASSES.get(str(settings.get("task_type")))
    if task:
        return getattr(transformers, task)
    mapping = settings.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else _architecture(base)
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class '{name}', but '{base}' has to be loaded as one.")
    return found


def _architecture(base: Path) -> str:
    """The class of the model that was saved as a checkpoint; empty if unknown."""
    architectures = read_config(base).get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def model_settings(base: Path) -> dict[str, Any]:
    """What PEFT's Auto classes need to know of a checkpoint: the class of the model, and its task if it has one."""
    name = _architecture(base)
    kind = getattr(transformers, name, None)
    if kind is None:
        return {}
    mapping = {"base_model_class": name, "parent_library": kind.__module__}
    tasks = [{"task_type": task} for ending, task in _TASKS.items() if name.endswith(ending)]
    return {"auto_mapping": mapping, **(tasks[0] if tasks else {})}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of missing tensors, which we check, and its progress bars outside a terminal."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
