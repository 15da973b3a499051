"""Squared gradients of the examples of a batch: of all at once where that is right, otherwise one after the other.

One example at a time is the definition. Whether a batch at once gives the same depends on the model and its loss, so
it is found out: a few examples are scored both ways, and only what agrees is used for the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_child.selection.batches import some_examples
from peft_child.selection.capture import Owners, Taps
from peft_child.selection.example_gradients import Part, add_squares
from peft_child.selection.reduction import Comparison, Weighing
from peft_child.selection.squares import squaring


_COMPARED = 2  # examples that are scored both ways

logger = logging.getLogger(__name__)


class BatchScorer:
    """Adds the squared gradients of examples to the scores of the targets.

    Args:
        model: The model, in which the targets alone require gradients.
        targets: Parameters by name, none of them sharded.
        scores: Where to add, by name.
        loss_of: From a batch to its loss, a scalar.
        checked_loss_of: The same for a single example, with its number in the data; raises if there is none that can
            be scored.
        on_scored: Called with numbers of examples that have been scored.
        at_once: Whether several examples may be done at once at all.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        loss_of: Callable[[Any], Any],
        checked_loss_of: Callable[[Any, int], Tensor],
        on_scored: Callable[[int], None],
        at_once: bool = True,
    ) -> None:
        self._targets = targets
        self._scores = scores
        self._loss_of = loss_of
        self._checked_loss_of = checked_loss_of
        self._on_scored = on_scored
        self._owners = Owners(model, targets)
        self._weighing = Weighing()
        self._layouts: set[tuple[Any, ...]] = set()  # those that a comparison has shown to be right
        self._given_up = not at_once

    def add(self, batch: Any, size: int, first: int) -> None:
        """Score the examples of a batch.

        Args:
            batch: The batch.
            size: Number of its examples.
            first: Number of the first of them in the data, for errors.
        """
        self._add(batch, range(first, first + size))

    def _add(self, batch: Any, numbers: Sequence[int]) -> None:
        while len(numbers) > 1 and not self._given_up:
            if self._add_at_once(batch, len(numbers)):
                return
            if not self._layouts:
                self._consider_modules()
            if not self._given_up:
                batch, numbers = self._compare_some(batch, numbers)
        if numbers:
            self._add_one_by_one(batch, numbers)

    def _consider_modules(self) -> None:
        """Give up if second runs of modules would cost more than there is to gain."""
        weights, kinds = self._owners.to_run_again()
        if 2 * weights > sum(parameter.numel() for parameter in self._targets.values()):
            self._give_up(f"most targeted weights are in modules ({kinds}) whose gradients have no formula here")

    def _add_one_by_one(
        self, batch: Any, numbers: Sequence[int], observe: Callable[[str, Tensor], None] | None = None
    ) -> list[float]:
        """Score examples by the definition; their losses."""
        losses = []
        with squaring(self._targets, self._scores, observe=observe) as square:
            for index, number in enumerate(numbers):
                loss = self._checked_loss_of(some_examples(batch, [index], len(numbers)), number)
                losses.append(loss.item())
                square(loss)
                self._on_scored(1)
        return losses

    def _add_at_once(self, batch: Any, size: int) -> bool:
        """Score all examples together, unless something about the batch is not known to be right."""
        weights = self._weighing.weights(batch, size)
        if weights is None or not self._layouts:
            return False
        with self._owners.tapped(size) as taps:
            loss = self._try_loss(batch, taps)
            if loss is None or not taps.layouts <= self._layouts:
                return False
            scale = 1 / max(weights)  # as large as the gradients of single examples, which low precision can hold
            factors = [1 / (weight * scale) ** 2 for weight in weights]
            taps.backward(loss, scale, partial(self._add_squares, factors))
        self._on_scored(size)
        return True

    def _add_squares(self, factors: list[float], name: str, parts: Sequence[Part]) -> None:
        add_squares(self._scores[name], parts, factors, self._targets[name].device)

    def _try_loss(self, batch: Any, taps: Taps) -> Tensor | None:
        """The loss of a batch with a graph to the taps, or none if it has to be taken apart."""
        try:
            loss = self._loss_of(batch)
        except Exception as error:  # whatever a model made for single examples may say
            lines = str(error).strip().splitlines() or [""]
            self._give_up(f"the model fails with a batch ({type(error).__name__}: {lines[0]})")
            return None
        if taps.refusal is not None:
            self._give_up(taps.refusal)
            return None
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            self._give_up("the targeted weights are used without calling their modules")
            return None
        return loss if math.isfinite(loss.item()) else None

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        logger.warning(
            "Fisher information: every example takes a forward and a backward pass of its own, which is slower than "
            "whole batches, because %s.",
            reason,
        )

    # Comparison

    def _compare_some(self, batch: Any, numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        """Score a few examples one by one and learn from doing them together as well; the others."""
        size = len(numbers)
        chosen = self._weighing.telling(batch, size, _COMPARED)
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
        with self._owners.tapped(size) as taps:
            loss = self._try_loss(batch, taps)
            if loss is None:
                return
            try:
                taps.backward(loss, 1.0, partial(self._note_norms, together))
            except Exception as error:  # as those of the forward pass
                self._give_up(f"gradients of a batch cannot be taken apart ({type(error).__name__}: {error})")
                return
        self._weighing.learn(
            batch,
            Comparison(
                losses,
                loss.item(),
                torch.stack(list(alone.values())),
                torch.stack(list(together.values())),
                torch.tensor([[parameter.numel()] for parameter in self._targets.values()], dtype=torch.float64),
                min(
                    (parameter.dtype for parameter in self._targets.values()),
                    key=lambda dtype: -torch.finfo(dtype).eps,
                ),
            ),
        )
        if self._weighing.failure is not None:
            self._give_up(self._weighing.failure)
        self._layouts |= taps.layouts

    def _note_norms(self, norms: dict[str, Tensor], name: str, parts: Sequence[Part]) -> None:
        size = len(norms[name])
        target = self._targets[name]
        for index in range(size):
            squares = torch.zeros(target.shape, device=target.device)
            add_squares(squares, parts, [float(index == other) for other in range(size)], target.device)
            norms[name][index] = squares.sum(dtype=torch.float64)


def _note_norm(norms: dict[str, Tensor], index: int, name: str, gradient: Tensor) -> None:
    norms[name][index] = gradient.square().sum(dtype=torch.float64)
