"""Captures what per-example gradients are computed from, in one forward and one backward pass of a whole batch.

Hooks on the modules that own targeted parameters keep the input of the module and the gradient of its output. The
parameters themselves require no gradients, so none is computed for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peft_child.selection.example_gradients import Part
from peft_child.selection.module_gradients import Use, formula_of
from peft_child.selection.squares import arrived_in_parts
from peft_child.tensors.quantised import PackedWeight


Sink = Callable[[str, Sequence[Part]], None]


class CannotCaptureError(Exception):
    """A module takes or returns what cannot be divided among the examples; the message says what."""


class Owners:
    """The modules of a model that own targeted parameters.

    Args:
        model: The model.
        targets: Parameters by name.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in targets.items()}
        self.targets = targets
        self.keys: dict[nn.Module, dict[str, str]] = {}  # for each module, names of targets by key in the module
        for module in model.modules():
            owned = {key: names[id(value)] for key, value in module._parameters.items() if id(value) in names}
            if owned:
                self.keys[module] = owned
        for name, parameter in targets.items():
            if isinstance(parameter, PackedWeight):
                self.keys.setdefault(parameter.module, {})["weight"] = name

    def without_formula(self) -> set[str]:
        """Names of the targets that need autograd: an owner has no formula, or hooks come before ours."""
        if _has_any_global_hook():
            return set(self.targets)
        owned = ((module, key, name) for module, names in self.keys.items() for key, name in names.items())
        without = {name for module, key, name in owned if formula_of(module, key) is None}
        return without | {name for name, parameter in self.targets.items() if parameter._backward_hooks}

    def to_run_again(self) -> tuple[int, str]:
        """Number of weights in matrices without a formula, and the kinds of the modules that own them."""
        weights, kinds = 0, set()
        for module, owned in self.keys.items():
            for key, name in owned.items():
                if self.targets[name].dim() > 1 and formula_of(module, key) is None:
                    weights += self.targets[name].numel()
                    kinds.add(type(module).__name__)
        return weights, ", ".join(sorted(kinds))

    @contextmanager
    def capture(self, examples: int, rows: Collection[int] | None = None) -> Iterator[Capture]:
        """Hook the modules for a forward and a backward pass of a batch, in which the targets require no gradients.

        Args:
            examples: Number of its examples.
            rows: How many rows one example can have in the output of a module; see `rows_of_example`. By default any
                number, which is right for a single example.
        """
        capture = Capture(self, examples, rows)
        with ExitStack() as stack:
            for module in self.keys:
                # Before all other hooks, which may change the output.
                handle = module.register_forward_hook(capture.keep, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            yield capture

    @contextmanager
    def used_elsewhere(self) -> Iterator[set[str]]:
        """Watch a forward pass for targets that are used outside the calls of the modules that own them.

        Yields:
            Their names, complete when the context is left.
        """
        watch = _Watch({id(parameter): name for name, parameter in self.targets.items()})
        if not self.targets:  # a watch costs time
            yield watch.found
            return
        with ExitStack() as stack:
            for module, owned in self.keys.items():
                enter, leave = partial(watch.enter, owned), partial(watch.leave, owned)
                # Inside the hooks of others, which are not part of the module's own computation.
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
            stack.enter_context(watch)
            yield watch.found


class _Watch(TorchDispatchMode):
    """Notes which tensors are read while no owner of them runs."""

    supports_higher_order_operators = True

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._running: list[str] = []  # a list, since calls of the owners may be nested
        self.found: set[str] = set()

    def enter(self, owned: Mapping[str, str], *_: Any) -> None:
        self._running += owned.values()

    def leave(self, owned: Mapping[str, str], *_: Any) -> None:
        for name in owned.values():
            if name in self._running:  # not if a hook before ours has failed
                self._running.remove(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in (*tensors, *(tensor._base for tensor in tensors)):  # views that were made before, too
            name = self._names.get(id(tensor))
            if name is not None and name not in self._running:
                self.found.add(name)
        return func(*args, **(kwargs or {}))


class Capture:
    """What is captured of one batch.

    Attributes:
        divisions: How the inputs of the modules are divided among the examples, as `Use.division` describes it.
    """

    def __init__(self, owners: Owners, examples: int, rows: Collection[int] | None) -> None:
        self._owners = owners
        self._examples = examples
        self._rows = rows
        self._anchor = torch.zeros((), requires_grad=True)  # starts the graph, since the parameters do not
        self._uses: dict[str, list[Use]] = {}
        self._done: set[str] = set()
        self._early: set[str] = set()
        self._sink: Sink | None = None
        self.divisions: set[tuple[Any, ...]] = set()

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: keep the input of a module, and hook its output to get its gradient."""
        if not torch.is_grad_enabled():  # backward does not come here, or runs the module again (checkpointing)
            return None
        if isinstance(output, Tensor) and not output.numel():  # nothing was computed: an expert without tokens
            return None
        length = len(output) if isinstance(output, Tensor) and output.dim() else 0
        shared = length == 1 < self._examples
        each, left = divmod(length, self._examples)
        if not shared and (left or (self._rows is not None and each not in self._rows)):
            shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise CannotCaptureError(
                f"a {type(module).__name__} should return one tensor, with one row, or one row for each token, for "
                f"each of {self._examples} examples in its first dimension, but returns {shape}"
            )
        if shared:  # a copy for each example, whose gradients would be summed otherwise
            output = output.repeat(self._examples, *[1] * (output.dim() - 1))
        inputs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.layout != torch.strided for leaf in tree_leaves(inputs)):
            raise CannotCaptureError(f"a {type(module).__name__} is called with a sparse tensor")
        use = Use(module, inputs, self._examples, shared, length)
        self.divisions.add(use.division())
        for name in self._owners.keys[module].values():
            self._uses.setdefault(name, []).append(use)
        return _Kept.apply(self._anchor, output, partial(self._keep_gradient, use))  # type: ignore[no-untyped-call]

    def unclear(self) -> set[str]:
        """Names of the targets whose gradients cannot be had from what a forward pass has left.

        The model has changed an input after its module was called, or has computed gradients itself.
        """
        changed = {name for name, uses in self._uses.items() if any(use.is_changed() for use in uses)}
        return changed | self._early

    def backward(self, loss: Tensor, scale: float, sink: Sink) -> None:
        """Run backward and hand the parts of each target's gradients to a sink as soon as they are complete.

        Args:
            loss: Scalar loss of the batch.
            scale: Factor for all gradients.
            sink: Called with the name of a target and its parts, once for each target that the loss reaches.

        Raises:
            RuntimeError: If a target's gradient arrives in parts.
        """
        self._sink = sink
        loss.backward(gradient=torch.full_like(loss, scale))
        with torch.no_grad():
            for name in list(self._uses):  # those with a use that the loss does not reach
                self._finish(name)

    @torch.no_grad()
    def _keep_gradient(self, use: Use, gradient: Tensor) -> None:
        if self._sink is None:
            self._early |= set(self._owners.keys[use.module].values())
            return
        use.gradient = gradient
        for name in self._owners.keys[use.module].values():
            if all(each.gradient is not None for each in self._uses.get(name, ())):
                self._finish(name)

    def _finish(self, name: str) -> None:
        uses = self._uses.pop(name, [])
        reached = [use for use in uses if use.gradient is not None]
        if name in self._done and reached:
            raise arrived_in_parts(name)
        self._done.add(name)
        if reached:
            assert self._sink is not None
            keys = self._owners.keys
            parts = [use.part(key) for use in reached for key, own in keys[use.module].items() if own == name]
            self._sink(name, parts)
        for use in uses:  # free the tensors, unless another target of the module still needs them
            if not any(use is other for waiting in self._uses.values() for other in waiting):
                use.gradient, use.inputs = None, ((), {})


class _Kept(torch.autograd.Function):
    """An output under a node of its own, which starts the graph if there is none yet.

    The model's hooks, and its changes in place, come after this node: what arrives here is the gradient of the output.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, keep_gradient: Callable[[Tensor], None]) -> Tensor:
        ctx.keep_gradient = keep_gradient
        return output.detach()  # an alias that is no view for autograd, which refuses changes of views from here

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None]:
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.keep_gradient(gradient)
        return None, gradient if ctx.needs_input_grad[1] else None, None
