"""The squared gradients of one loss at a time: that of an example, or of a batch that is not taken apart.

Single entries need the gradient of every targeted weight. Input channels need only what a module reads and the
gradient of what it returns, so a weight takes a gradient only where its module has no formula, or where the model uses
it without calling the module. Quantised weights take no gradients: for single entries, too, the gradient of one such
weight at a time is computed from what its module reads and the gradient of what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_child.selection.capture import Owners
from peft_child.selection.example_gradients import Part, add_squares
from peft_child.selection.loss import Loss
from peft_child.selection.squares import clipping, squaring
from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.quantised import is_quantised


Observer = Callable[[str, Tensor], None]


class LossSquares:
    """Adds the squared gradients of one loss after the other to the scores of the targets.

    Args:
        loss: How to get the loss of a batch from the model, in which no parameter requires gradients.
        targets: Parameters by name.
        scores: Where to add, by name: float32, in the shape of the parameter, or a number for each of its channels.
        layouts: How input channels lie in the targets, by name; empty if single entries are scored.
        max_norm: Clip each parameter's gradient to this L2 norm before squaring, as the authors' code does.
    """

    def __init__(
        self,
        loss: Loss,
        targets: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        layouts: Mapping[str, ChannelLayout],
        max_norm: float | None = None,
    ) -> None:
        self._loss = loss
        self._targets = targets
        self._scores = scores
        self._layouts = layouts
        self._max_norm = max_norm
        without = Owners(loss.model, targets).without_formula()
        dense = () if layouts else (name for name, parameter in targets.items() if not is_quantised(parameter))
        self._let_take_gradients(without | set(dense))

    def add(self, batch: Any, number: int, observe: Observer | None = None) -> float:
        """Run the model forward and backward, and add the squared gradients of the loss.

        Args:
            batch: The batch.
            number: Number of its first example in the data, for errors.
            observe: Called with the name and the squared norm (float64) of the gradient of every target that the loss
                reaches.

        Returns:
            The loss.
        """
        with (
            squaring(self._taking, self._scores, self._max_norm, self._layouts, observe),
            self._others.capture(1) as capture,
        ):
            try:
                with self._others.used_elsewhere() as elsewhere:
                    output = self._loss.unchecked(batch)
                elsewhere |= capture.unclear()
            except Exception:  # of any kind: perhaps the model only works if its weights take gradients
                if not self._others.targets or any(map(is_quantised, self._others.targets.values())):
                    raise
                elsewhere = set(self._others.targets)
            if not elsewhere:
                loss = self._loss.check(output, batch, number)
                capture.backward(loss, 1.0, partial(self._add_parts, observe))
                return loss.item()
        # Again, since what is captured lacks these uses. It ends: every time more targets take their own gradients.
        self._let_take_gradients(self._taking.keys() | elsewhere)
        return self.add(batch, number, observe)

    def _let_take_gradients(self, names: Set[str]) -> None:
        self._taking = {name: parameter for name, parameter in self._targets.items() if name in names}
        others = {name: parameter for name, parameter in self._targets.items() if name not in names}
        self._others = Owners(self._loss.model, others)

    def _add_parts(self, observe: Observer | None, name: str, parts: Sequence[Part]) -> None:
        device = self._targets[name].device
        squares = torch.zeros(self._scores[name].shape, device=device)
        add_squares(squares, parts, [1.0], device, self._layouts.get(name))
        norm = squares.sum(dtype=torch.float64)
        if observe is not None:
            observe(name, norm)
        if self._max_norm is not None:
            squares *= clipping(norm.sqrt().float(), self._max_norm).square()
        self._scores[name].add_(squares.to(self._scores[name].device))
