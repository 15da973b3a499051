"""Squared gradients of the examples of a batch: of all at once where that is right, otherwise one after the other.

Scores are defined by one example at a time. Whether a whole batch gives the same depends on the model and its loss. So
the first examples are scored both ways, and whole batches are used only if the two agree.
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
from peft_child.selection.capture import CannotCaptureError, Capture, Owners
from peft_child.selection.example_gradients import Part, add_squares
from peft_child.selection.loss import Loss
from peft_child.selection.loss_squares import LossSquares
from peft_child.selection.reduction import Comparison, Reduction
from peft_child.tensors.channels import ChannelLayout


logger = logging.getLogger(__name__)


class BatchScorer:
    """Adds the squared gradients of examples to the scores of the targets.

    Args:
        loss: How to get the loss of a batch from the model, in which no parameter requires gradients.
        targets: Parameters by name, none of them sharded if `at_once`.
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
        self._alone = LossSquares(loss, targets, scores, layouts)
        self._owners = Owners(loss.model, targets)
        self._reduction = Reduction()
        self._divisions: set[tuple[Any, ...]] = set()  # those that a comparison has confirmed
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
            if not self._divisions:  # whole batches save nothing if most modules run again for each example
                weights, kinds = self._owners.to_run_again()
                if 2 * weights > sum(parameter.numel() for parameter in self._targets.values()):
                    reason = f"most targeted weights are in modules ({kinds}) whose gradients have no formula here"
                    self._go_one_by_one(reason)
            if self._at_once:
                batch, numbers = self._compare(batch, numbers)
        if numbers:
            self._add_one_by_one(batch, numbers)

    def _add_one_by_one(
        self, batch: Any, numbers: Sequence[int], observe: Callable[[str, Tensor], None] | None = None
    ) -> list[float]:
        """Score examples by the definition; returns their losses."""
        size = len(numbers)
        return [
            self._alone.add(some_examples(batch, [index], size), number, observe)
            for index, number in enumerate(numbers)
        ]

    def _add_at_once(self, batch: Any, size: int) -> bool:
        """Score all examples together, unless comparisons have not shown yet that this is right for such a batch."""
        weights = self._reduction.weights(batch, size)
        if weights is None or not self._divisions:
            return False
        with self._owners.capture(size, rows_of_example(batch, size)) as capture:
            loss = self._loss_at_once(batch, capture)
            if loss is None or not capture.divisions <= self._divisions:
                return False
            scale = 1 / max(weights)  # makes gradients as large as those of single examples: small ones underflow
            factors = [1 / (weight * scale) ** 2 for weight in weights]  # undoes weight and scale in the squares
            capture.backward(
                loss, scale, lambda name, parts: self._add_parts(self._scores[name], name, parts, factors)
            )
        return True

    def _add_parts(self, score: Tensor, name: str, parts: Sequence[Part], factors: Sequence[float]) -> None:
        add_squares(score, parts, factors, self._targets[name].device, self._layouts.get(name))

    def _loss_at_once(self, batch: Any, capture: Capture) -> Tensor | None:
        """The loss of a batch, with a graph to what is captured; None if its examples must be scored one by one."""
        try:
            loss = self._loss.unchecked(batch)
        except CannotCaptureError as error:
            self._go_one_by_one(str(error))
            return None
        except Exception as error:  # of any kind: the model may be made for single examples
            lines = str(error).strip().splitlines() or [""]
            self._go_one_by_one(f"the model fails with a batch ({type(error).__name__}: {lines[0]})")
            return None
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            self._go_one_by_one("the targeted weights are used without calling their modules")
            return None
        if capture.unclear():
            self._go_one_by_one("the model changes inputs of modules in place, or computes gradients itself")
            return None
        return loss if math.isfinite(loss.item()) else None  # scored one by one, the example at fault is named

    def _go_one_by_one(self, reason: str) -> None:
        self._at_once = False
        logger.warning(
            "Fisher information: the examples are scored one by one, each with a forward and a backward pass of its "
            "own, which is slower than whole batches. The reason: %s.",
            reason,
        )

    def _compare(self, batch: Any, numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        """Score two examples both ways, and rule out reductions; returns the other examples and their numbers."""
        size = len(numbers)
        chosen = self._reduction.most_telling(batch, size)
        others = [index for index in range(size) if index not in chosen]
        rest = some_examples(batch, others, size), [numbers[index] for index in others]
        batch, numbers, size = some_examples(batch, chosen, size), [numbers[index] for index in chosen], len(chosen)
        alone = {name: torch.zeros(size, dtype=torch.float64) for name in self._targets}
        together = {name: torch.zeros(size, dtype=torch.float64) for name in self._targets}
        losses = []
        for index, number in enumerate(numbers):
            example = some_examples(batch, [index], size)
            losses += self._add_one_by_one(example, [number], partial(_note_norm, alone, index))
        with self._owners.capture(size, rows_of_example(batch, size)) as capture:
            loss = self._loss_at_once(batch, capture)
            if loss is None:
                return rest  # without the two, which have been scored alone
            try:
                capture.backward(loss, 1.0, partial(self._note_norms, together))
            except Exception as error:  # of any kind, as in the forward pass
                self._go_one_by_one(f"gradients of a batch cannot be taken apart ({type(error).__name__}: {error})")
                return rest
        comparison = Comparison(
            losses,
            loss.item(),
            torch.stack(list(alone.values())),
            torch.stack(list(together.values())),
            torch.tensor([[parameter.numel()] for parameter in self._targets.values()], dtype=torch.float64),
            max({parameter.dtype for parameter in self._targets.values()}, key=lambda dtype: torch.finfo(dtype).eps),
        )
        problem = self._reduction.learn(batch, comparison)
        if problem is not None:
            self._go_one_by_one(problem)
        self._divisions |= capture.divisions
        return rest

    def _note_norms(self, norms: dict[str, Tensor], name: str, parts: Sequence[Part]) -> None:
        size = len(norms[name])
        for index in range(size):
            squares = torch.zeros(self._scores[name].shape, device=self._targets[name].device)
            # As the scores are added, one example at a time, so that the comparison covers the same code.
            self._add_parts(squares, name, parts, [float(index == other) for other in range(size)])
            norms[name][index] = squares.sum(dtype=torch.float64)


def _note_norm(norms: dict[str, Tensor], index: int, name: str, norm: Tensor) -> None:
    norms[name][index] = norm
