"""Counts the optimizer steps that gradient masks depend on, with hooks that torch calls around every optimizer's step.

What is global here has to be: compiled programs can hold the number of an object, but not the object itself, and torch
calls its hooks for all optimizers of the process. The hooks are made when the first mask is.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_child.tensors.partitioned import copied_by


class MaskOwner(Protocol):
    """An object that knows the masks of some parameters, and counts the optimizer steps that are done on them."""

    def masked(self, key: str, gradient: Tensor) -> Tensor:
        """The gradient of a tensor with its mask at the present step."""
        ...

    def count_step(self, stepped: Container[int] | None = None) -> None:
        """Count one optimizer step on the parameters with these ids, by default on all."""
        ...


class MaskUse(NamedTuple):
    """The mask of an owner, looked up when a gradient arrives.

    Attributes:
        owner: Its number.
        key: The owner's key of the tensor.
    """

    owner: int
    key: str

    def apply(self, gradient: Tensor) -> Tensor:
        """The masked and scaled gradient."""
        if torch.compiler.is_compiling():  # the step must not become a constant of the compiled program
            masked: Tensor = torch.ops.peft_child.mask_gradient(gradient, self.owner, self.key)
            return masked
        return _mask_gradient(gradient, self.owner, self.key)


_OWNERS: WeakValueDictionary[int, MaskOwner] = WeakValueDictionary()  # by number
_COUNTING: WeakValueDictionary[int, MaskOwner] = WeakValueDictionary()  # those of them that have masks
_NUMBERS = itertools.count()


class _Step:
    """The optimizer step in progress, with the steps inside of it: a wrapper's step calls that of what it wraps.

    Attributes:
        open: Optimizers whose steps have begun and not ended.
        counted: The `id()` of each parameter for which the step has been counted.
        copied: The same for parameters of which an optimizer steps copies. DeepSpeed steps them group after group.
        news: Owners of the gradients that were masked since the last step began. If there are any, a step that is
            still open has failed, and the next call of `begin` opens a new one.
        masked: Owners of the gradients that this step is for. DeepSpeed also steps copies before there are gradients.
    """

    def __init__(self) -> None:
        self.open: list[int] = []
        self.counted: set[int] = set()
        self.copied: set[int] = set()
        self.news: set[int] = set()
        self.masked: set[int] = set()

    def begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.news or not self.open:
            self.open, self.counted = [], set()
        if self.news:
            self.masked, self.news, self.copied = self.news, set(), set()
        self.open.append(id(optimizer))

    def end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self.open:
            del self.open[self.open.index(id(optimizer)) :]  # with the steps inside of it that failed
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler skips it by itself
        if not _COUNTING or (found_inf is not None and bool(found_inf)):
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        copied = copied_by(optimizer)
        for number, owner in list(_COUNTING.items()):
            new = stepped - self.counted  # a wrapper has the parameters of what it wraps, too
            owner.count_step(new | (copied - self.copied) if number in self.masked else new)
        self.counted |= stepped
        self.copied |= copied


_STEP = _Step()


def numbered(owner: MaskOwner) -> int:
    """Give an owner a number, by which it can be found as long as it lives."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def owner_of(number: int) -> MaskOwner:
    """The owner with a number."""
    return _OWNERS[number]


def count_steps(number: int) -> None:
    """Let an owner that has masks count the optimizer steps from now on."""
    _register_hooks()
    _COUNTING[number] = _OWNERS[number]


def _mask_gradient(gradient: Tensor, owner: int, key: str) -> Tensor:
    _STEP.news.add(owner)
    return owner_of(owner).masked(key, gradient)


# CUDA graphs would replay one mask for ever.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_operator = torch.library.custom_op(
    "peft_child::mask_gradient",
    _mask_gradient,
    mutates_args=(),
    schema="(Tensor gradient, int owner, str key) -> Tensor",
    **_TAGS,
)
_operator.register_fake(lambda gradient, owner, key: torch.empty_like(gradient))


@cache  # so that a second call registers nothing
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_STEP.begin)
    register_optimizer_step_post_hook(_STEP.end)
