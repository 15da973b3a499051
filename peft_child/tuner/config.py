"""The settings of a Child-Tuning adapter."""

from __future__ import annotations

import enum
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import PeftConfig

from peft_child.card.model_card import complete_card
from peft_child.layers.granularity import GRANULARITIES, INPUT_CHANNEL
from peft_child.tensors.delta import ChildSize, check_share
from peft_child.tensors.gradient_mask import GradientMask


T = TypeVar("T")


class ChildPeftType(str, enum.Enum):
    """The method's name in PEFT, in an enum of our own, because PEFT's enum cannot be extended from outside.

    The name is that of the package: where it was not imported, PEFT's `KeyError` shows what to import.
    """

    PEFT_CHILD = "PEFT_CHILD"


VARIANTS = ("task_driven", "random", "task_free", "extracted")
_OF_THE_PAPER = {"CT_D": "task_driven", "CT_F": "task_free"}
FISHER = ("per_example", "authors")
DELTA_DTYPE_NAMES = ("float32", "bfloat16", "float16")
CHECK_BASE = ("warn", "error", "off")


def _setting(default: T, text: str) -> T:
    """A field of the configuration, described as Hugging Face's parsers expect it."""
    described: T = field(default=default, metadata={"help": text})
    return described


@dataclass
class ChildTuningConfig(PeftConfig):
    """Configuration of Child-Tuning (Xu et al., "Raise a Child in Large Language Model", EMNLP 2021).

    Child-Tuning updates only a child network, a subset of the entries of the targeted parameters. Every field is
    described in its `help`; `ChildTuningConfig.describe()` prints them.

    Raises:
        ValueError: If a field has a value outside its range.
    """

    variant: str = _setting(
        "task_driven",
        "How the child network is chosen. 'task_driven' (Child-Tuning_D): the entries with the largest Fisher "
        "information, by `select_child_network`. 'random': a fixed random one, drawn from `seed` and the names of the "
        "parameters; needs no data. 'task_free' (Child-Tuning_F): all entries, but each keeps its gradient only with "
        "probability `density`, and kept gradients are scaled by 1/density; the mask is redrawn every "
        "`resample_every` optimizer steps. It needs no data, and its delta is dense. 'extracted': taken from the "
        "difference of checkpoints, or combined from adapters; only for loading.",
    )
    density: float = _setting(
        0.1,
        "Share of the entries that belong to the child network, in (0, 1], counted over all targeted parameters "
        "together. Exactly round(density * n) of n entries are chosen; memory use and file size grow with the "
        "density. Called p_D or reserve_p elsewhere. For 'task_free', the probability of keeping a gradient, p_F.",
    )
    gradient_density: float = _setting(
        1.0,
        "Task-free Child-Tuning on top of a fixed child network: the probability p, in (0, 1], with which each of its "
        "entries keeps its gradient at an optimizer step; kept gradients are scaled by 1/p. 1.0 keeps all.",
    )
    granularity: str = _setting(
        "entry",
        "What is chosen: 'entry', single weights; or 'input_channel', all weights of a module that read one input "
        "feature (the columns of a linear weight, the rows of an embedding, a whole bias). Channels train about "
        "as fast as a LoRA and are chosen without scores of single weights. Whole channels are chosen, those with the "
        "largest mean Fisher information first, until the next would exceed round(density * n) entries. Random "
        "gradient masks keep or drop the gradients of whole channels, too.",
    )
    resample_every: int = _setting(
        1, "Optimizer steps after which the random gradient mask is drawn anew, a positive integer."
    )
    target_modules: list[str] | set[str] | str | None = _setting(
        None,
        "Modules whose parameters, biases included, form the whole network: a list of names or endings of names, a "
        "regular expression for full names, or 'all-linear' for every linear layer but the head. A module includes "
        "the modules inside it. By default PEFT's choice for the architecture.",
    )
    target_parameters: list[str] | str | None = _setting(
        None,
        "Single parameters to target besides `target_modules`, whatever their shape: a list of names or endings of "
        "names, such as 'LayerNorm.weight', or a regular expression for full names.",
    )
    exclude_modules: list[str] | set[str] | str | None = _setting(
        None, "Modules to leave out of `target_modules`: a list of names or endings, or an expression."
    )
    layers_to_transform: list[int] | int | None = _setting(
        None, "Indices of the layers to which a list of `target_modules` is restricted; by default all layers."
    )
    layers_pattern: list[str] | str | None = _setting(
        None, "Name of the module list that holds the layers, if PEFT does not find it."
    )
    modules_to_save: list[str] | None = _setting(
        None, "Modules trained densely and saved whole, such as a new head; the density does not count them."
    )
    seed: int = _setting(
        0, "Seed of the random child network and of the gradient masks, an integer from 0 to 2**63 - 1."
    )
    fisher: str = _setting(
        "per_example",
        "How `select_child_network` estimates the Fisher information. 'per_example': mean over examples of the "
        "squared gradient of the example's loss, without dropout or clipping. 'authors': as in the code released with "
        "the paper, mean over batches of the squared gradient of the batch loss, with dropout as in training and the "
        "gradient of each parameter clipped to norm 1.",
    )
    fisher_examples: int | None = _setting(
        None, "Number of examples the Fisher information was estimated on; recorded by the selection."
    )
    labels: list[str] | None = _setting(
        None,
        "Names of the classes of a classifier, in their order; recorded when it is saved, so that its base can be "
        "loaded with as many.",
    )
    init_weights: bool = _setting(
        True, "True starts from the base model (deltas of zero), False from small random deltas (tests)."
    )
    delta_dtype: str = _setting(
        "float32",
        "Dtype of the deltas in the file: 'float32' is exact, 'bfloat16' and 'float16' take half of the space and "
        "round every delta, to 8 and 11 significant bits. In memory deltas are float32.",
    )
    check_base: str = _setting(
        "warn",
        "What to do if the base weights differ from those the adapter was made on: 'warn', 'error' or 'off'. "
        "Quantised weights are not compared; only 'off' does not warn of it if the adapter was made on others. "
        "Chosen by whoever loads it, as in `PeftModel.from_pretrained(base, name, check_base='error')`; not saved.",
    )
    child_sizes: dict[str, ChildSize] | None = _setting(
        None,
        "Entries, chosen entries and bytes of the index block of every parameter with a child network; recorded by "
        "the selection, for loaders that need to know shapes before they read the file.",
    )

    def __post_init__(self) -> None:
        """Check every field; PEFT calls this on construction and on loading alike."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = ChildPeftType.PEFT_CHILD
        self._check_numbers()
        if self.variant in _OF_THE_PAPER:
            raise ValueError(f"variant='{self.variant}' is called '{_OF_THE_PAPER[self.variant]}' here.")
        _check_choice("variant", self.variant, VARIANTS)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("fisher", self.fisher, FISHER)
        _check_choice("delta_dtype", self.delta_dtype, DELTA_DTYPE_NAMES)
        _check_choice("check_base", self.check_base, CHECK_BASE)
        if self.variant == "task_free" and self.gradient_density != 1:
            raise ValueError(
                f"gradient_density is for a fixed child network; for variant='task_free' set density instead, got "
                f"gradient_density={self.gradient_density!r}."
            )
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern"):
            _check_names(name, getattr(self, name), allow_text=name != "modules_to_save")
        self._check_layers()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.child_sizes is not None:
            _check_sizes(self.child_sizes)
            self.child_sizes = {name: ChildSize(*size) for name, size in self.child_sizes.items()}
        # Loading and saving record the sizes and labels for the next file here, and leave the fields as they are: the
        # user may make another model from this configuration, and its sizes and labels may differ.
        self.present_sizes, self.present_labels = self.child_sizes, self.labels

    def child_size(self, numel: int) -> int:
        """Number of entries in the child network of a network of `numel` entries.

        Raises:
            ValueError: If that rounds to none.
        """
        size = numel if self.variant == "task_free" else round(self.density * numel)
        if not size:
            raise ValueError(f"density={self.density} of {numel} targeted entries is an empty child network.")
        return size

    def gradient_mask(self) -> GradientMask | None:
        """The mask of the deltas' gradients as training starts, or None if all are kept."""
        density = self.density if self.variant == "task_free" else self.gradient_density
        if density == 1:
            return None
        by_channel = self.granularity == INPUT_CHANNEL
        return GradientMask(float(density), self.seed, self.resample_every, by_channel=by_channel)

    @classmethod
    def describe(cls) -> str:
        """One paragraph for each field of this class, with its default."""
        fields = [cls.__dataclass_fields__[name] for name in cls.__annotations__]
        return "\n".join(f"{item.name} = {item.default!r}\n    {item.metadata['help']}" for item in fields)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in a fixed order, so that equal configurations give equal files."""
        settings = super().to_dict() | {"child_sizes": self.present_sizes, "labels": self.present_labels}
        del settings["check_base"]  # chosen by whoever loads the adapter, see its help
        return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}

    def record_labels(self, model_config: Any) -> None:
        """Record the names of the classes of a classifier, from the configuration of its model, for the next file."""
        names = getattr(model_config, "id2label", None) or {}
        is_numbered = all(str(key).isdecimal() for key in names)  # keys may be strings
        if names and is_numbered and self.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            self.present_labels = [str(names[key]) for key in sorted(names, key=int)]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; also completes the model card in the folder, once there is a child network."""
        super().save_pretrained(save_directory, **kwargs)
        settings = self.to_dict()
        if settings["child_sizes"]:
            auto_mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping
            try:
                complete_card(save_directory, {**settings, "auto_mapping": auto_mapping})
            except ValueError as error:  # a card that cannot be read is no reason to lose a checkpoint
                warnings.warn(f"The adapter is saved, but its model card is not up to date. {error}", stacklevel=2)

    def _check_numbers(self) -> None:
        check_share("density", self.density)
        check_share("gradient_density", self.gradient_density)
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")
        if type(self.resample_every) is not int or self.resample_every < 1:
            raise ValueError(f"resample_every must be a positive integer, got {self.resample_every!r}.")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False, got {self.init_weights!r}.")
        examples = self.fisher_examples
        if examples is not None and (type(examples) is not int or examples < 1):
            raise ValueError(f"fisher_examples must be a positive integer or None, got {examples!r}.")
        labels = self.labels
        if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise ValueError(f"labels must be a list of names or None, got {labels!r}.")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(self.target_modules, str) and layers is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and layers is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if layers is None:
            return
        indices = layers if isinstance(layers, (list, tuple)) else [layers]
        if not indices or any(type(index) is not int or index < 0 for index in indices):
            raise ValueError(f"layers_to_transform must be non-negative integers, at least one, got {layers!r}.")
        if self.target_modules is None and self.target_parameters is not None:
            raise ValueError(f"layers_to_transform needs a list of target_modules, which is None; got {layers!r}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_names(name: str, value: object, allow_text: bool) -> None:
    if value is None:
        return
    if allow_text and isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{name} must be a valid regular expression, got {value!r}: {error}.") from None
        return
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(item, str) for item in value):
        kinds = "a list of names or a regular expression" if allow_text else "a list of names"
        raise ValueError(f"{name} must be {kinds}, got {value!r}.")


def _check_sizes(sizes: object) -> None:
    if not isinstance(sizes, dict):
        raise ValueError(f"child_sizes must map names of parameters to sizes, got {sizes!r}.")
    for name, size in sizes.items():
        whole = isinstance(size, (list, tuple)) and len(size) == 3 and all(type(number) is int for number in size)
        if not whole or not 1 <= size[1] <= size[0] or size[2] < 1:
            raise ValueError(
                f"child_sizes of '{name}' must be [entries, chosen entries from 1 to entries, bytes], got {size!r}."
            )
