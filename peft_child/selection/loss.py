"""The loss of a batch, from the model's output or from the user's functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


OVER_BATCHES = (
    "A loss over the whole batch (over pairs, or with in-batch negatives) has no gradient for a single example: pass "
    "split_batches=False."
)

Forward = Callable[[Any, Any], Any]


class Loss(NamedTuple):
    """How to get the loss of a batch.

    Attributes:
        model: The model.
        forward_fn: `forward_fn(model, batch)` in place of `model(**batch)`, if given.
        loss_fn: `loss_fn(output, batch)` in place of the loss in the output, if given.
    """

    model: nn.Module
    forward_fn: Forward | None
    loss_fn: Forward | None

    def unchecked(self, batch: Any) -> Any:
        """The raw loss output for a batch, or None."""
        output = self.model(**batch) if self.forward_fn is None else self.forward_fn(self.model, batch)
        if self.loss_fn is not None:
            return self.loss_fn(output, batch)
        # Without a loss_fn, look where transformers' Trainer looks as well.
        if isinstance(output, Tensor):
            return output if not output.dim() else None
        if isinstance(output, Mapping):
            return output.get("loss")
        if isinstance(output, tuple) and not hasattr(output, "loss") and output:
            return output[0] if isinstance(output[0], Tensor) and not output[0].dim() else None
        return getattr(output, "loss", None)

    def check(self, loss: Any, batch: Any, number: int) -> Tensor:
        """The raw loss output for a batch, as a finite scalar with a graph.

        Args:
            loss: What `unchecked` returned.
            batch: The batch.
            number: Number of its first example, for errors.

        Raises:
            ValueError: If it is no such loss.
        """
        if loss is None:
            keys = f" (they have {', '.join(map(str, batch))})" if isinstance(batch, Mapping) else ""
            renamed = " Rename 'label' to 'labels'." if keys and "label" in batch and "labels" not in batch else ""
            raise ValueError(
                f"The model returned no loss for example {number}: batches need labels{keys}, or a loss_fn.{renamed}"
            )
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"The loss of every example must be finite; that of example {number} is {value}.")
        if not loss.requires_grad:
            raise ValueError(f"The loss of example {number} does not depend on any targeted weight. {OVER_BATCHES}")
        return loss  # type: ignore[no-any-return]
