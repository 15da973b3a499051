"""Squared gradients of the examples of a batch: of all at once where that is right, otherwise one after the other.

One example at a time is the definition. Whether a whole batch gives the same depends on the model and its loss. So the
first examples are scored both ways, and whole batches are used only if the two agree.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_child.selection.batches import rows_of_example, some_examples
from peft_child.selection.capture import CannotCaptureError, Owners
from peft_child.selection.example_gradients import Part, add_channel_squares, add_squares
from peft_child.selection.loss import Loss
from peft_child.selection.reduction import Comparison, Reduction
from peft_child.selection.squares import squaring
from peft_child.tensors.channels import ChannelLayout


_COMPARED = 2  # examples that are scored both ways

logger = logging.getLogger(__name__)


class BatchScorer:
    """Adds the squared gradients of examples to the scores of the targets.

    Args:
        loss: How to get the loss of a batch from the model, in which the targets alone require gradients.
        targets: Parameters by name, none of them sharded.
        scores: Where to add, by name: in the shape of the parameter, or a number for each of its channels.
        layouts: How input channels lie in the targets, by name; empty if single entries are scored.
        at_once: Whether whole batches may be tried.
    """

    def __init__(
        self,
        loss: Loss,
        targets: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        layouts: Mapping[str, ChannelLayout],
        at_once: bool,
    ) -> None:
        self._loss = loss
        self._targets = targets
        self._scores = scores
        self._layouts = layouts
        self._owners = Owners(loss.model, targets)
        self._reduction = Reduction()
        self._divisions: set[tuple[Any, ...]] = set()  # those that a comparison has shown to be right
        self._at_once = at_once

    def add(self, batch: Any, size: int, first: int) -> None:
        """Score the examples of a batch.

        Args:
            batch: The batch.
            size: Number of its examples.
            first: Number of the first of them in the data, for errors.
        """
        numbers: Sequence[int] = range(first, first + size)
        while len(numbers) > 1 and self._at_once:
            if self._add_at_once(batch, len(numbers)):
                return
            if not self._divisions:
                self._consider_modules()
            if self._at_once:
                batch, numbers = self._compare_some(batch, numbers)
        if numbers:
            self._add_one_by_one(batch, numbers)

    def _consider_modules(self) -> None:
        """Go one by one if running modules again would cost more than a whole batch saves."""
        weights, kinds = self._owners.to_run_again()
        if 2 * weights > sum(parameter.numel() for parameter in self._targets.values()):
            self._go_one_by_one(f"most targeted weights are in modules ({kinds}) whose gradients have no formula here")

    def _add_one_by_one(
        self, batch: Any, numbers: Sequence[int], observe: Callable[[str, Tensor], None] | None = None
    ) -> list[float]:
        """Score examples by the definition; returns their losses."""
        losses = []
        with squaring(self._targets, self._scores, layouts=self._layouts, observe=observe) as square:
            for index, number in enumerate(numbers):
                loss = self._loss.checked(some_examples(batch, [index], len(numbers)), number)
                losses.append(loss.item())
                square(loss)
        return losses

    def _add_at_once(self, batch: Any, size: int) -> bool:
        """Score all examples together, unless something about the batch is not known to be right."""
        weights = self._reduction.weights(batch, size)
        if weights is None or not self._divisions:
            return False
        with self._owners.capture(size, rows_of_example(batch, size)) as capture:
            loss = self._loss_at_once(batch)
            if loss is None or not capture.divisions <= self._divisions:
                return False
            scale = 1 / max(weights)  # as large as the gradients of single examples, which low precision can hold
            factors = [1 / (weight * scale) ** 2 for weight in weights]
            capture.backward(loss, scale, partial(self._add_squares, factors))
        return True

    def _add_squares(self, factors: list[float], name: str, parts: Sequence[Part]) -> None:
        device = self._targets[name].device
        if self._layouts:
            add_channel_squares(self._scores[name], self._layouts[name], parts, factors, device)
        else:
            add_squares(self._scores[name], parts, factors, device)

    def _loss_at_once(self, batch: Any) -> Tensor | None:
        """The loss of a batch with a graph to what is captured, or None if the batch has to be taken apart."""
        try:
            loss = self._loss.unchecked(batch)
        except CannotCaptureError as error:
            self._go_one_by_one(str(error))
            return None
        except Exception as error:  # whatever a model made for single examples may say
            lines = str(error).strip().splitlines() or [""]
            self._go_one_by_one(f"the model fails with a batch ({type(error).__name__}: {lines[0]})")
            return None
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            self._go_one_by_one("the targeted weights are used without calling their modules")
            return None
        return loss if math.isfinite(loss.item()) else None

    def _go_one_by_one(self, reason: str) -> None:
        self._at_once = False
        logger.warning(
            "Fisher information: every example takes a forward and a backward pass of its own, which is slower than "
            "whole batches, because %s.",
            reason,
        )

    # Comparison

    def _compare_some(self, batch: Any, numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        """Score a few examples both ways, and learn from it; returns the others."""
        size = len(numbers)
        chosen = self._reduction.most_telling(batch, size, _COMPARED)
        self._compare(some_examples(batch, chosen, size), [numbers[index] for index in chosen])
        others = [index for index in range(size) if index not in chosen]
        return some_examples(batch, others, size), [numbers[index] for index in others]

    def _compare(self, batch: Any, numbers: Sequence[int]) -> None:
        size = len(numbers)
        alone = {name: torch.zeros(size, dtype=torch.float64) for name in self._targets}
        together = {name: torch.zeros(size, dtype=torch.float64) for name in self._targets}
        losses = []
        for index, number in enumerate(numbers):
            example = some_examples(batch, [index], size)
            losses += self._add_one_by_one(example, [number], partial(_note_norm, alone, index))
        with self._owners.capture(size, rows_of_example(batch, size)) as capture:
            loss = self._loss_at_once(batch)
            if loss is None:
                return
            try:
                capture.backward(loss, 1.0, partial(self._note_norms, together))
            except Exception as error:  # as those of the forward pass
                self._go_one_by_one(f"gradients of a batch cannot be taken apart ({type(error).__name__}: {error})")
                return
        problem = self._reduction.learn(
            batch,
            Comparison(
                losses,
                loss.item(),
                torch.stack(list(alone.values())),
                torch.stack(list(together.values())),
                torch.tensor([[parameter.numel()] for parameter in self._targets.values()], dtype=torch.float64),
                max(
                    (parameter.dtype for parameter in self._targets.values()), key=lambda dtype: torch.finfo(dtype).eps
                ),
            ),
        )
        if problem is not None:
            self._go_one_by_one(problem)
        self._divisions |= capture.divisions

    def _note_norms(self, norms: dict[str, Tensor], name: str, parts: Sequence[Part]) -> None:
        size = len(norms[name])
        target = self._targets[name]
        for index in range(size):
            alone = [float(index == other) for other in range(size)]
            if self._layouts:
                squares = torch.zeros(self._layouts[name].number, device=target.device)
                add_channel_squares(squares, self._layouts[name], parts, alone, target.device)
            else:
                squares = torch.zeros(target.shape, device=target.device)
                add_squares(squares, parts, alone, target.device)
            norms[name][index] = squares.sum(dtype=torch.float64)


def _note_norm(norms: dict[str, Tensor], index: int, name: str, gradient: Tensor) -> None:
    norms[name][index] = gradient.square().sum(dtype=torch.float64)
