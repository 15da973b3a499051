"""Which parameters of a base model an adapter's configuration names, and which modules own them.

Names are those of the base model without any adapter, so that they mean the same for every adapter and in every file.
A tensor that several modules own (tied weights) is one target with several owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peft_child.layer import ChildTuningLayer


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Owner(NamedTuple):
    """A module that owns a targeted parameter.

    Attributes:
        path: Name of the module in the base model.
        module: The module itself, never an adapter layer.
        parameter: Name of the parameter in the module.
        entry: Name of the outermost module that already has an adapter layer around this one, or `path`.
    """

    path: str
    module: nn.Module
    parameter: str
    entry: str

    @property
    def name(self) -> str:
        """Name of the parameter in the base model, at this owner."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


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


class Place(NamedTuple):
    """A module of the base model and where it stands.

    Attributes:
        path: Its name in the base model.
        module: The module itself, never an adapter layer.
        entry: Name of the outermost module that already has an adapter layer around this one, or `path`.
        named: Whether the configuration names it, or the closest module around it of which it says anything: True,
            False, or None for excluded.
    """

    path: str
    module: nn.Module
    entry: str
    named: bool | None


def base_modules(model: nn.Module, names_module: Callable[[str], bool | None] = lambda path: False) -> Iterator[Place]:
    """Walk the modules of the base model, past adapter layers and without modules that are trained densely.

    Args:
        model: The base model, with or without adapter layers in it.
        names_module: Whether the configuration names a module: True, False, or None if it excludes it.

    Yields:
        Every module under every name that it has, parents first.
    """
    yield from _walk(model, "", None, False, names_module)


def _walk(
    module: nn.Module, path: str, entry: str | None, inherited: bool | None, names_module: Callable[[str], bool | None]
) -> Iterator[Place]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    if isinstance(module, ChildTuningLayer):
        module, entry = module.base_layer, path if entry is None else entry
    named = names_module(path) if path else False
    named = inherited if named is False else named
    yield Place(path, module, path if entry is None else entry, named)
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, entry, named, names_module)


def find_targets(
    model: nn.Module, names_module: Callable[[str], bool | None], names_parameter: Callable[[str], bool]
) -> list[Target]:
    """Find the targeted parameters of a model.

    Args:
        model: The base model, with or without adapter layers in it.
        names_module: Whether the configuration names a module: True, False, or None if it excludes it.
        names_parameter: Whether the configuration names a parameter by itself.

    Returns:
        The targets, in the order of the model.

    Raises:
        ValueError: If a target is quantised, not floating point, on the top-level module, or tied to a module that
            is trained densely.
    """
    found: dict[int, Target] = {}
    wanted: set[int] = set()
    seen: set[tuple[int, str]] = set()
    for place in base_modules(model, names_module):
        if place.named:
            _check_holds_weights(place)
        for key, parameter in place.module.named_parameters(recurse=False, remove_duplicate=False):
            owner = Owner(place.path, place.module, key, place.entry)
            if place.named or (place.named is False and names_parameter(owner.name)):
                _check(parameter, owner)
                wanted.add(id(parameter))
            if (id(place.module), key) not in seen:  # else the same module under another name
                seen.add((id(place.module), key))
                found.setdefault(id(parameter), Target(parameter, [])).owners.append(owner)
    targets = [target for target in found.values() if id(target.parameter) in wanted]
    _check_dense_copies(model, targets)
    return targets


def _check_holds_weights(place: Place) -> None:
    """Some quantised layers keep integers in buffers, where no parameter would be found to refuse."""
    for name, buffer in place.module.named_buffers(recurse=False):
        if name in ("qweight", "W_q", "codebooks"):
            _refuse(f"{place.path}.{name}", buffer)


def _check(parameter: nn.Parameter, owner: Owner) -> None:
    if not owner.path:
        raise ValueError(
            f"Parameter '{owner.name}' belongs to the top-level module, which PEFT cannot replace; target parameters "
            "of modules inside it."
        )
    tensor: object = parameter
    is_packed = is_traceable_wrapper_subclass(tensor) and type(tensor).__name__ != "DTensor"
    if parameter.dtype not in DTYPES or is_packed:
        _refuse(owner.name, parameter)


def _refuse(name: str, parameter: torch.Tensor) -> None:
    raise ValueError(
        f"Child-Tuning needs a floating point weight of dtype {', '.join(str(dtype)[6:] for dtype in DTYPES)}; "
        f"'{name}' is a {type(parameter).__name__} of {parameter.dtype}. Quantised weights are not supported yet: "
        "load the base model without quantisation, or exclude the module."
    )


def _check_dense_copies(model: nn.Module, targets: list[Target]) -> None:
    """A tied weight cannot be frozen under its child network and trained densely elsewhere."""
    dense = {
        id(parameter): name
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for parameter in module.original_module.parameters()
    }
    for target in targets:
        if id(target.parameter) in dense:
            raise ValueError(
                f"'{target.name}' is tied to '{dense[id(target.parameter)]}', which is trained densely "
                "(modules_to_save); a tensor can be only one of the two."
            )
