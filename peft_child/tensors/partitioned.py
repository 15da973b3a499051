"""Parameters that DeepSpeed has taken over.

With ZeRO-3 every process holds a part of each parameter, and an empty tensor stands in its place until DeepSpeed
gathers the parts, which it does around the calls of the module that owns it. The attributes of such a parameter tell;
DeepSpeed itself is imported only where there is one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a parameter, be it gathered at present or not."""
    return hasattr(tensor, "ds_id")


def is_away(tensor: Tensor) -> bool:
    """Whether an empty tensor stands in the place of a parameter that ZeRO-3 has partitioned."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, also while it is partitioned."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def numel_of(tensor: Tensor) -> int:
    """The number of entries of the whole tensor, also while it is partitioned."""
    return shape_of(tensor).numel()


def check_gathered(what: str, tensor: Tensor) -> None:
    """Raise a `RuntimeError` if an empty tensor stands in the place of a parameter."""
    if is_away(tensor):
        raise RuntimeError(
            f"{what} is partitioned over processes (ZeRO-3) and not gathered, so that it cannot be read: call the "
            "engine that deepspeed.initialize or accelerator.prepare returns, or enclose the call in "
            "deepspeed.zero.GatheredParameters(model.parameters()), on every rank; to merge, save the adapter, and "
            "load it in one process."
        )


@contextmanager
def gathered_whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has partitioned, to read them; every rank has to enter this with the same ones."""
    away = [parameter for parameter in parameters if is_away(parameter)]
    if not away:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(away):
        yield


def gather_with(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Let DeepSpeed gather parameters that a module reads and does not own, now and in each of its later calls.

    Nothing is done unless DeepSpeed has put its hooks on the module, which release the parameters again.
    """
    if not has_hooks(module):
        return
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return
    import deepspeed

    for parameter in partitioned:
        deepspeed.zero.register_external_parameter(module, parameter)
    away: list[Any] = [parameter for parameter in partitioned if is_away(parameter)]
    if away:
        away[0].all_gather(away)


def has_hooks(module: nn.Module) -> bool:
    """Whether DeepSpeed gathers and releases partitioned parameters around the calls of a module."""
    return "ds_recompute_parameters" in vars(module)


def is_optimized(parameter: Tensor) -> bool:
    """Whether an engine of DeepSpeed trains copies or parts of a parameter, which cannot be replaced or loaded."""
    return is_partitioned(parameter) or hasattr(parameter, "get_full_hp_param")


def check_not_optimized(name: str, parameter: Tensor, what: str) -> None:
    """Raise a `ValueError` if an engine of DeepSpeed trains a parameter, saying what cannot be done any more."""
    if is_optimized(parameter):
        raise ValueError(
            f"'{name}' belongs to an engine of DeepSpeed, whose optimizer would not see the change: {what} before "
            "deepspeed.initialize (accelerator.prepare, trainer.train)."
        )


def is_in_engine(model: nn.Module) -> bool:
    """Whether an engine of DeepSpeed (`deepspeed.initialize`) has taken a model over, or is the model."""
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return True
    modules, parameters = model.modules(), model.parameters()
    return any(map(has_hooks, modules)) or any(hasattr(each, "get_full_hp_param") for each in parameters)


# By optimizer, the ids of the parameters whose copies it steps.
_COPIED: WeakKeyDictionary[torch.optim.Optimizer, frozenset[int]] = WeakKeyDictionary()
_GROUPS = ("bit16_groups", "fp16_groups", "bf16_groups")  # ZeRO-1 and 2, ZeRO-3, and the optimizer of bfloat16


def copied_by(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    """The ids of the parameters that DeepSpeed trains by letting an optimizer step flat copies of them.

    Nothing leads from the optimizer to them, so DeepSpeed's own optimizers are found through the garbage collector,
    once for each optimizer.
    """
    if "deepspeed" not in sys.modules:
        return frozenset()
    if optimizer not in _COPIED:
        found: set[int] = set()
        for wrapper in gc.get_objects():
            if str(type(wrapper).__module__).startswith("deepspeed.") and _inner(wrapper) is optimizer:
                found |= {id(parameter) for group in _groups(wrapper) for parameter in group}
        _COPIED[optimizer] = frozenset(found)
    return _COPIED[optimizer]


def _inner(wrapper: object) -> object:
    return vars(wrapper).get("optimizer") if hasattr(wrapper, "__dict__") else None


def _groups(wrapper: object) -> Iterator[Sequence[Tensor]]:
    for name in _GROUPS:
        yield from vars(wrapper).get(name) or ()
