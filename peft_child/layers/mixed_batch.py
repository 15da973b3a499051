"""Batches whose rows are run with different adapters: PEFT's `adapter_names=` in inference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


BASE = "__base__"  # PEFT's name for rows without an adapter
READ_DIRECTLY = RuntimeError(
    "This weight is used without a call of its module, so adapter_names= cannot run its rows with different adapters: "
    "use set_adapter, and one batch for each adapter."
)


class MixedBatch(NamedTuple):
    """The adapters of the rows of a batch.

    Attributes:
        names: The adapter of each row, or `BASE`.
        beams: Beams of a search, which repeats each row so many times.
    """

    names: list[str]
    beams: int

    def for_rows(self, count: int) -> list[str]:
        """The adapter of each of so many rows; errors are worded as in PEFT."""
        if count == len(self.names):
            return self.names
        if count != len(self.names) * self.beams:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {count} respectively."
            )
        return [name for name in self.names for _ in range(self.beams)]

    def call(
        self,
        run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
        known: Collection[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module once for each adapter, with the rows that are for it.

        Args:
            run: Runs the module with an adapter, or `BASE`, on some rows.
            known: The adapters that change the module; other rows are run together, as those without an adapter.
            args: Arguments for all rows; tensors with as many rows are divided.
            kwargs: Likewise.

        Returns:
            The outputs of all rows, in their order.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = len(tensors[0])
        names = [name if name in known else BASE for name in self.for_rows(count)]
        parts, order = [], []
        for adapter in dict.fromkeys(names):
            rows = [row for row, name in enumerate(names) if name == adapter]
            own_args, own_kwargs = tree_map_only(Tensor, partial(_rows, torch.tensor(rows), count), (args, kwargs))
            parts.append(run(adapter, own_args, own_kwargs))
            order += rows
        back = torch.tensor(order, device=tensors[0].device).argsort()
        return tree_map(lambda *outputs: torch.cat(outputs).index_select(0, back), *parts)


def _rows(rows: Tensor, count: int, tensor: Tensor) -> Tensor:
    """Some rows of a tensor that has one for each of `count`; any other tensor is for all of them."""
    return tensor.index_select(0, rows.to(tensor.device)) if tensor.dim() and len(tensor) == count else tensor


@contextmanager
def heads_by_row(model: nn.Module, mixed: MixedBatch) -> Iterator[None]:
    """Let modules that are saved whole run each row with the copy of its adapter, as PEFT's wrappers can."""

    def with_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": mixed.for_rows(len(args[0]))}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.callback(module.register_forward_pre_hook(with_names, with_kwargs=True).remove)
        yield


def check_mixed_batch(names: Sequence[str], known: Collection[str], training: bool, merged: bool) -> None:
    """Refuse what cannot be run row by row; the errors are worded as in PEFT.

    Args:
        names: The adapter of each row.
        known: The adapters of the model.
        training: Whether the model is in training mode.
        merged: Whether an adapter is merged.

    Raises:
        ValueError: If the model is in training mode, an adapter is unknown, or one is merged.
    """
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(names) - set(known) - {BASE}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
