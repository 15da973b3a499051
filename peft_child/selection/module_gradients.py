"""The gradients of a module's parameters for each example, from one call of the module and its output's gradient.

Modules of common kinds have a formula. Any other is run again for each example alone, with this example's part of the
input and of the output's gradient, and autograd differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from peft_child.layers.packed import packed_weight
from peft_child.selection.example_gradients import Each, Part, Product, Rows, Whole, product
from peft_child.tensors.compose import changes_in


@dataclass(eq=False)
class Use:
    """One call of a module in the forward pass of a batch.

    Attributes:
        module: The module.
        inputs: Positional and keyword arguments.
        examples: Number of examples in the batch.
        shared: Whether the call served all examples at once (an output with a first dimension of 1).
        length: First dimension of the output; every example has equally many rows of it.
        gradient: Gradient of the output, once backward has computed it; its first dimension is `length`, or `examples`
            if the call was shared.
        versions: Counts of the changes of its arguments in place, when it was made.
        device: The type of the device that it ran on.
        autocast: The dtype of autocast then, or None.
    """

    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    examples: int
    shared: bool
    length: int
    gradient: Tensor | None = None
    versions: list[int] = field(init=False)
    device: str = field(init=False)
    autocast: torch.dtype | None = field(init=False)

    def __post_init__(self) -> None:
        self.versions = self._changes()
        tensors = (leaf for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, Tensor))
        self.device = next((tensor.device.type for tensor in tensors), "cpu")  # parameters may be offloaded
        self.autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None

    def same_autocast(self) -> torch.autocast:
        """Autocast as it was when the call was made."""
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)

    def is_changed(self) -> bool:
        """Whether an argument was changed in place since the call."""
        return self.versions != self._changes()

    def _changes(self) -> list[int]:
        return [changes_in(leaf) for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, Tensor)]

    def part(self, key: str) -> Part:
        """What this call adds to the gradient of one of the module's parameters, for each example."""
        return (formula_of(self.module, key) or _of_second_runs)(self, key)

    def division(self) -> tuple[Any, ...]:
        """A key that is equal for calls whose inputs are divided among the examples in the same way."""
        leaves = tree_flatten(self.inputs)[0]
        dims = [(leaf.dim(), self.is_divided(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return id(self.module), self.shared, self.length == self.examples, *dims

    def is_divided(self, leaf: Any) -> bool:
        """Whether each example has a part of its own of an argument."""
        return isinstance(leaf, Tensor) and not self.shared and leaf.dim() > 0 and len(leaf) == self.length

    def input(self) -> Tensor:
        """The only tensor among the arguments, expanded to the first dimension of the gradient if it is shared."""
        (tensor,) = [leaf for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, Tensor)]
        return tensor.expand(self.examples, *tensor.shape[1:]) if self.shared else tensor

    def output_gradient(self) -> Tensor:
        """The gradient, which backward has computed."""
        assert self.gradient is not None
        return self.gradient


def formula_of(module: nn.Module, key: str) -> Callable[[Use, str], Part] | None:
    """The formula for the `forward` of a module, which subclasses may inherit; None if there is none."""
    if packed_weight(module) is not None:
        return _of_linear
    if key not in ("weight", "bias") or "forward" in vars(module):  # a forward replaced in this instance
        return None
    if isinstance(module, nn.Embedding) and (
        module.sparse or module.scale_grad_by_freq or module.max_norm is not None  # not in the formula
    ):
        return None
    return _FORMULAS.get(type(module).forward)


def _by_token(tensor: Tensor, examples: int, dims: int = 1) -> Tensor:
    """Shape `(examples, tokens, *last dims)`."""
    return tensor.reshape(examples, -1, *tensor.shape[tensor.dim() - dims :])


def _of_linear(use: Use, key: str) -> Part:
    gradient = _by_token(use.output_gradient(), use.examples)
    if key == "bias":
        return Whole(gradient.sum(1))
    # Under autocast the input can have another dtype than the output.
    return product(gradient, _by_token(use.input(), use.examples).to(gradient.dtype), gradient)


def _of_conv1d(use: Use, key: str) -> Part:
    part = _of_linear(use, key)  # but with a transposed weight
    return Product(part.right, part.left, part.tokens) if isinstance(part, Product) else part


def _of_embedding(use: Use, key: str) -> Part:
    module: Any = use.module
    ids = use.input().reshape(use.examples, -1)
    values = _by_token(use.output_gradient(), use.examples)
    if module.padding_idx is not None:  # autograd gives its row no gradient either
        values = values.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
    return Rows(ids, values, module.num_embeddings)


def _of_layer_norm(use: Use, key: str) -> Part:
    module: Any = use.module
    gradient = use.output_gradient().float()
    if key == "weight":
        gradient = gradient * F.layer_norm(use.input().float(), module.normalized_shape, eps=module.eps)
    return Whole(_by_token(gradient, use.examples, len(module.normalized_shape)).sum(1))


def _of_second_runs(use: Use, key: str) -> Part:
    return Each(partial(_run_again, use, key))


def _run_again(use: Use, key: str, example: int) -> Tensor:
    """The gradient of one example, from a second run of the module."""
    parameter = use.module._parameters[key]
    assert parameter is not None
    leaves, spec = tree_flatten(use.inputs)
    each = 1 if use.shared else use.length // use.examples  # rows of an example
    own = slice(example * each, (example + 1) * each)
    with torch.enable_grad(), use.same_autocast():
        parameter.requires_grad_(True)
        try:
            args, kwargs = tree_unflatten([leaf[own] if use.is_divided(leaf) else leaf for leaf in leaves], spec)
            output = use.module.forward(*args, **kwargs)  # not the module, whose hooks have run already
            (found,) = torch.autograd.grad(output, parameter, use.output_gradient()[own], materialize_grads=True)
        finally:
            parameter.requires_grad_(False)
    return found.to_dense() if found.is_sparse else found


_FORMULAS: dict[Any, Callable[[Use, str], Part]] = {
    nn.Linear.forward: _of_linear,
    Conv1D.forward: _of_conv1d,
    nn.Embedding.forward: _of_embedding,
    nn.LayerNorm.forward: _of_layer_norm,
    **{kind.forward: _of_second_runs for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},  # cheap, so as good as a formula
}
