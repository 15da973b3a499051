"""Which parameters of a base model a configuration targets, and which modules own them.

Names are those in the base model without adapters, so that they are the same for every adapter and in every file.
A tensor that several modules own (tied weights) is one target with several owners.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, cast

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from peft_child.layers.granularity import INPUT_CHANNEL
from peft_child.layers.layer import ChildTuningLayer
from peft_child.layers.packed import SUPPORTED, packed_weight, parameters_of
from peft_child.tensors.distributed import is_sharded
from peft_child.tensors.quantised import PackedWeight, is_quantised
from peft_child.tuner.config import ChildTuningConfig


# The heads that PEFT saves whole for a task. It adds them to `modules_to_save` only after injection.
_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # read without being called
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ModulePlace(NamedTuple):
    """A module of the base model, and what the configuration says of it.

    Attributes:
        path: Its name in the base model.
        module: The module itself, never an adapter layer.
        entry: The name at which PEFT's loop reaches it: PEFT skips what is inside an adapter layer, so this is the
            name of the outermost enclosing module that already has a layer, or else `path`.
        named: True for targeted, None for excluded, False for neither. A module that the configuration does not name
            inherits this from the module around it, and nothing inside an excluded module can be targeted.
    """

    path: str
    module: nn.Module
    entry: str
    named: bool | None


class Owner(NamedTuple):
    """A module that owns a parameter, and the parameter's name there."""

    place: ModulePlace
    parameter: str

    @property
    def name(self) -> str:
        """Name of the parameter in the base model, at this owner."""
        return f"{self.place.path}.{self.parameter}" if self.place.path else self.parameter


class Target(NamedTuple):
    """A targeted parameter.

    Attributes:
        parameter: The tensor.
        owners: Every module that owns it, in the order of the model; the first one holds the delta.
    """

    parameter: nn.Parameter
    owners: list[Owner]

    @property
    def name(self) -> str:
        """Its name in the base model, at its first owner."""
        return self.owners[0].name


def find_targets(model: nn.Module, config: ChildTuningConfig) -> list[Target]:
    """Find the parameters that a configuration names.

    Targeting a module targets the modules inside it. Excluding a module excludes them, and so does saving it whole
    (`modules_to_save`, with the head of the task type).

    Args:
        model: The base model, with or without adapter layers in it.
        config: The configuration; 'all-linear' must have been resolved with `all_linear`.

    Returns:
        The targets, in the order of the model.

    Raises:
        ValueError: If a target is not floating point, or packed without a way to unpack it; if it belongs to the
            top-level module, or is tied to a weight that is trained densely; or if an entry of `target_parameters`
            matches nothing.
        TypeError: If a module cannot be saved whole; PEFT would raise it after it has changed the model.
    """
    found: dict[int, Target] = {}
    wanted: set[int] = set()
    seen: set[tuple[int, str]] = set()
    for place in _places(model, config):
        _check_place(place, config)
        for key, parameter in parameters_of(place.module).items():
            owner = Owner(place, key)
            identity = id(place.module if isinstance(parameter, PackedWeight) else parameter)
            if place.named or (place.named is False and names_parameter(config.target_parameters, owner.name)):
                _check_weight(parameter, owner, config)
                wanted.add(identity)
            if (id(place.module), key) not in seen:  # a module with two names is visited twice, but is one owner
                seen.add((id(place.module), key))
                found.setdefault(identity, Target(cast(nn.Parameter, parameter), [])).owners.append(owner)
    targets = [target for identity, target in found.items() if identity in wanted]
    _check_dense_copies(model, config, targets)
    _check_entries(config.target_parameters, targets)
    return targets


def names_parameter(target_parameters: Collection[str] | str | None, name: str) -> bool:
    """Whether names or endings of names, or a regular expression for full names, name a parameter."""
    if not target_parameters:
        return False
    if isinstance(target_parameters, str):
        return re.fullmatch(target_parameters, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def all_linear(model: nn.Module, config: ChildTuningConfig) -> set[str]:
    """Names of all linear layers but the head, as PEFT's 'all-linear', also if earlier adapters have wrapped them."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    head = head.base_layer if isinstance(head, ChildTuningLayer) else head
    places = (place for place in _places(model, config) if place.module is not head and place.named is not None)
    return {place.path for place in places if _is_linear(place.module)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or packed_weight(module) is not None


def saved_whole(config: ChildTuningConfig) -> tuple[str, ...]:
    """Endings of the names of the modules that PEFT trains densely and saves whole."""
    heads = _HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()
    return (*(config.modules_to_save or ()), *heads)


def _places(model: nn.Module, config: ChildTuningConfig) -> Iterator[ModulePlace]:
    """Every module of the base model under every name that it has, parents first; not those trained densely."""

    def walk(module: nn.Module, path: str, entry: str | None, around: bool | None) -> Iterator[ModulePlace]:
        if isinstance(module, AuxiliaryTrainingWrapper):
            return
        if isinstance(module, ChildTuningLayer):
            module, entry = module.base_layer, path if entry is None else entry
        elif isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"'{path}' is a {type(module).__module__}.{type(module).__qualname__} of another PEFT method; "
                "Child-Tuning cannot be combined with others in one model."
            )
        named = _names_module(config, path) if path else False
        named = around if named is False or around is None else named
        yield ModulePlace(path, module, path if entry is None else entry, named)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name, entry, named)

    return walk(model, "", None, False)


def _names_module(config: ChildTuningConfig, path: str) -> bool | None:
    if path.endswith(saved_whole(config)):
        return None
    matched = check_target_module_exists(config, path)
    return None if isinstance(matched, _ExcludedModule) else bool(matched)


# Checks


def _check_place(place: ModulePlace, config: ChildTuningConfig) -> None:
    if isinstance(place.module, _CONTAINERS) and place.path.endswith(saved_whole(config)):
        raise TypeError(
            f"modules_to_save cannot be applied to modules of type {type(place.module)}, such as '{place.path}'; name "
            "the modules in it."
        )
    if not place.named or packed_weight(place.module) is not None:
        return
    for name, buffer in place.module.named_buffers(recurse=False):
        if name in ("qweight", "W_q", "codebooks"):  # quantised layers without any parameter
            _refuse(f"{place.path}.{name}", place.module, buffer)


def _check_weight(parameter: Tensor, owner: Owner, config: ChildTuningConfig) -> None:
    if not owner.place.path:
        raise ValueError(
            f"Parameter '{owner.name}' belongs to the top-level module, which PEFT cannot replace; target parameters "
            "of modules inside it."
        )
    if hasattr(nn.ParameterDict(), owner.parameter):
        raise ValueError(
            f"'{owner.name}' has the name of a method or attribute of the containers of deltas (nn.ParameterDict); "
            "Child-Tuning cannot target it."
        )
    if isinstance(owner.place.module, _CONTAINERS):
        raise ValueError(
            f"'{owner.name}' is in a {type(owner.place.module).__name__}, which is read without being called; "
            "Child-Tuning cannot target it."
        )
    tensor: object = parameter
    can_be_read = is_sharded(parameter) or is_quantised(parameter) or not is_traceable_wrapper_subclass(tensor)
    if parameter.dtype not in WEIGHT_DTYPES or not can_be_read:
        _refuse(owner.name, owner.place.module, parameter)
    by_channel = config.granularity == INPUT_CHANNEL and config.variant != "task_free"
    if isinstance(parameter, PackedWeight) and parameter.unpack is None and not by_channel:
        raise ValueError(
            f"'{owner.name}' is in a {type(owner.place.module).__name__}, whose weight cannot be unpacked, so single "
            "entries of it cannot be trained: use granularity='input_channel' (not with variant='task_free'), or "
            "exclude the module."
        )


def _refuse(name: str, module: nn.Module, tensor: Tensor) -> None:
    raise ValueError(
        f"Child-Tuning needs a floating point weight of dtype {', '.join(str(dtype)[6:] for dtype in WEIGHT_DTYPES)}; "
        f"'{name}' of a {type(module).__name__} is a {type(tensor).__name__} of {tensor.dtype}. {SUPPORTED}: load the "
        "base model in another way, or exclude the module."
    )


def _check_dense_copies(model: nn.Module, config: ChildTuningConfig, targets: list[Target]) -> None:
    """A tied weight cannot be frozen under its child network and trained densely elsewhere."""
    dense = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for parameter in module.original_module.parameters()
    }
    expressions = [rf".*{re.escape(name)}($|\.)" for name in saved_whole(config)]
    for target in targets:
        is_dense = id(target.parameter) in dense
        for owner in target.owners:
            if is_dense or any(re.match(expression, owner.place.path) for expression in expressions):
                raise ValueError(
                    f"'{owner.name}' is tied between a targeted module and one that is trained densely "
                    "(modules_to_save); a tensor can be only one of the two."
                )


def _check_entries(target_parameters: Collection[str] | str | None, targets: list[Target]) -> None:
    names = [owner.name for target in targets for owner in target.owners]
    for entry in [target_parameters] if isinstance(target_parameters, str) else target_parameters or ():
        pattern = entry if isinstance(target_parameters, str) else [entry]
        if not any(names_parameter(pattern, name) for name in names):
            raise ValueError(f"target_parameters must each match a parameter of the model; '{entry}' matches none.")
