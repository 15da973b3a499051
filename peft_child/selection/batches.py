"""Batches of any shape taken apart into examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


_TELLING = ("labels", "label", "input_ids")  # these have one row for each example, whatever else is in a batch


def some_examples(batch: Any, indices: Sequence[int], size: int) -> Any:
    """The examples at `indices` in a batch of `size`, as a batch; padding stays."""
    return batch if list(indices) == list(range(size)) else _take(batch, indices, size)


def batch_size(batch: Any) -> int:
    """Number of examples in a batch.

    It is the common first dimension of its tensors, or the length of its lists if it has no tensors. Where tensors
    disagree, `labels`, `label` or `input_ids` decide; a tensor with a first dimension of 1 is then for every example.

    Raises:
        ValueError: If they do not agree, and nothing decides.
    """
    leaves = tree_leaves(_plain(batch), is_leaf=_is_column)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {len(tensor) for tensor in tensors} or {len(leaf) for leaf in leaves if _is_column(leaf)}
    if len(sizes) == 1:
        return sizes.pop()
    telling = [batch[key] for key in _TELLING if isinstance(batch, Mapping) and isinstance(batch.get(key), Tensor)]
    size = len(telling[0]) if telling and telling[0].dim() else None
    if size is None or (size > 1 and sizes - {1, size}):  # a single example is never divided
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensors"
        raise ValueError(
            "To take a batch apart into examples, its tensors must agree in their first dimension (one row for each "
            f"example); got {shapes}. Use a dataloader whose batches are single examples, and split_batches=False."
        )
    return size


def rows_of_example(batch: Any, size: int) -> set[int]:
    """How many rows an example can have in a tensor that a model made of a batch: one, or one for each token.

    With any other number the rows may belong to other examples: a model that leaves padding out has fewer rows for
    shorter examples, and their total may happen to be divisible by the number of examples.
    """
    shapes = [
        leaf.shape for leaf in tree_leaves(_plain(batch)) if isinstance(leaf, Tensor) and leaf.shape[:1] == (size,)
    ]
    return {1, *(math.prod(shape[1:end]) for shape in shapes for end in range(2, len(shape) + 1))}


def check_batch(batch: Any) -> None:
    """Raise a `ValueError` if a model cannot take this as a batch, such as a row of a dataset or a name."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    is_row = isinstance(ids, Tensor) and ids.dim() < 2
    leaves = tree_leaves(dict(batch)) if isinstance(batch, Mapping) else []
    if is_row or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"Batches must be mappings of tensors with a row for each example, got {_described(batch)}. "
            "For a dataset or a list of rows pass DataLoader(rows, batch_size=8, collate_fn=data_collator), for "
            "example with DataCollatorWithPadding(tokenizer), or trainer.get_train_dataloader(); for other batches "
            "pass a forward_fn."
        )


def _described(batch: Any) -> str:
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}"
    kinds = {
        key: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for key, leaf in batch.items()
    }
    return "{" + ", ".join(f"{key}: {kind}" for key, kind in kinds.items()) + "}"


def labelled(batch: Any) -> list[int] | None:
    """Which examples of a batch have a label other than -100, which losses ignore; None if all have, or may have."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return None
    rows = labels.reshape(len(labels) if labels.dim() else 1, -1)
    found: list[int] = rows.ne(-100).any(1).nonzero().flatten().tolist()
    return None if len(found) == len(rows) else found


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings become plain dictionaries."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _plain(batch))


def _take(batch: Any, indices: Sequence[int], size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[list(indices)] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _take(value, indices, size) for key, value in batch.items()}
    if _is_column(batch):
        return [batch[index] for index in indices] if len(batch) == size else batch
    if isinstance(batch, (list, tuple)):
        taken = [_take(value, indices, size) for value in batch]
        return type(batch)(*taken) if hasattr(batch, "_fields") else type(batch)(taken)
    return batch


def _is_column(value: Any) -> bool:
    """Whether this is a list without tensors: a text, number or the like for each example."""
    return isinstance(value, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _plain(batch: Any) -> Any:
    # To torch's pytrees a mapping such as transformers' BatchEncoding is a single leaf.
    return dict(batch) if isinstance(batch, Mapping) else batch
