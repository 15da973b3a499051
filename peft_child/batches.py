"""Batches of any shape taken apart into single examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


_TELLING = ("labels", "label", "input_ids")  # what has one row for each example whatever else is in a batch


def single_examples(batch: Any) -> Iterator[Any]:
    """Every example of a batch as a batch of one.

    Raises:
        ValueError: If the batch does not tell its size.
    """
    size = batch_size(batch)
    if size == 1:
        yield batch
        return
    for index in range(size):
        yield _take(batch, index, size)


def batch_size(batch: Any) -> int:
    """Number of examples in a batch.

    It is the common first dimension of its tensors, or length of its lists if it has no tensors. Where tensors
    disagree, `labels` or `input_ids` decide; others may have a first dimension of 1, and then serve every example.

    Raises:
        ValueError: If they do not agree, and nothing decides.
    """
    leaves = tree_leaves(_plain(batch), is_leaf=_is_texts)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {len(tensor) for tensor in tensors} or {len(leaf) for leaf in leaves if _is_texts(leaf)}
    if len(sizes) == 1:
        return sizes.pop()
    telling = [batch[key] for key in _TELLING if isinstance(batch, Mapping) and isinstance(batch.get(key), Tensor)]
    size = len(telling[0]) if telling and telling[0].dim() else None
    if size is None or (size > 1 and sizes - {1, size}):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensors"
        raise ValueError(
            "The tensors of a batch must agree in their first dimension, the example, to be taken apart; got "
            f"{shapes}. Use a dataloader whose batches are single examples, and split_batches=False."
        )
    return size


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings become plain dictionaries."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _plain(batch))


def _take(batch: Any, index: int, size: int) -> Any:
    """One example of a batch of `size`, as a batch of one."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _take(value, index, size) for key, value in batch.items()}
    if _is_texts(batch):
        return batch[index : index + 1] if len(batch) == size else batch
    if isinstance(batch, (list, tuple)):
        taken = [_take(value, index, size) for value in batch]
        return type(batch)(*taken) if hasattr(batch, "_fields") else type(batch)(taken)
    return batch


def _is_texts(value: Any) -> bool:
    """Whether this is a list of one text, number or the like for each example."""
    return isinstance(value, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch
