"""Raises at the first optimizer step if a new delta is in no optimizer: the delta would silently never be trained.

This happens if the optimizer was made before the child network was chosen, chosen again, pruned or loaded. torch has
no list of optimizers, so they are found through the garbage collector, but only if a new delta has a gradient and the
optimizer that steps does not hold it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from peft_child.tensors.partitioned import copied_by


T = TypeVar("T")

# By id, the new deltas, until an optimizer that holds them steps.
_NEW: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
# By base layer and id, all its deltas that are still alive: an optimizer that holds one of them trains this model.
_OF_BASE: WeakKeyDictionary[nn.Module, WeakValueDictionary[int, nn.Parameter]] = WeakKeyDictionary()
# By optimizer, the ids of deltas that it need not hold, since they belong to models that it does not train.
_OF_OTHERS: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()


def expect_optimizer(delta: nn.Parameter, base_layer: nn.Module) -> None:
    """Make the first optimizer step on a delta's model raise an error if the delta is in no optimizer.

    Args:
        delta: The new delta.
        base_layer: The module of the delta. An optimizer that holds one of its earlier deltas trains this model.
    """
    _start_watching()
    _NEW[id(delta)] = delta
    _OF_BASE.setdefault(base_layer, WeakValueDictionary())[id(delta)] = delta


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = _parameters_of(optimizer)
    for held in stepped & set(_NEW):
        del _NEW[held]
    lost = {key for key, delta in list(_NEW.items()) if delta.grad is not None}
    if lost <= _OF_OTHERS.get(optimizer, set()):
        return
    for other in _living(Optimizer):
        lost -= _parameters_of(other)
    # Every module is asked, also those inside others; the whole model knows the most deltas, by their longest names.
    found = (_unheld(model, lost, stepped) for model in _living(nn.Module))
    unheld = max(found, key=lambda names: (len(names), sum(map(len, names))), default=[])
    if unheld:
        raise RuntimeError(
            f"{len(unheld)} deltas of a child network are in no optimizer and would not be trained, such as "
            f"'{unheld[0]}': they were made after the optimizer. Make the optimizer after the child network has been "
            "chosen, pruned or loaded; or freeze the deltas (requires_grad_(False))."
        )
    _OF_OTHERS[optimizer] = lost


def _unheld(model: nn.Module, lost: set[int], stepped: set[int]) -> list[str]:
    """Names of the deltas of a model that are in no optimizer, if the one that steps trains this model."""
    parameters = dict(model.named_parameters())
    ids = {id(parameter) for parameter in parameters.values()}
    if not lost & ids:
        return []
    earlier = {key for module in model.modules() for key in _OF_BASE.get(module, ())}
    names = (name for name, parameter in parameters.items() if id(parameter) in lost)
    return list(names) if stepped & (ids | earlier) else []


def _parameters_of(optimizer: Optimizer) -> set[int]:
    held = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    return held | copied_by(optimizer)


def _living(kind: type[T]) -> Iterator[T]:
    """All living objects of a class; `isinstance` would ask proxies what they stand for, which may run any code."""
    return (found for found in gc.get_objects() if issubclass(type(found), kind))


@cache
def _start_watching() -> None:
    register_optimizer_step_pre_hook(_check)
