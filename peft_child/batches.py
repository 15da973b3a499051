"""Batches of any shape taken apart into single examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def single_examples(batch: Any) -> Iterator[tuple[Any, int]]:
    """Every example of a batch as a batch of one, with its size."""
    size = batch_size(batch)
    for index in range(size):
        yield (_take(batch, index, size) if size > 1 else batch), 1


def batch_size(batch: Any) -> int:
    """Common first dimension of a batch's tensors; those with a first dimension of 1 serve every example."""
    tensors = [leaf for leaf in tree_leaves(_plain(batch)) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {len(tensor) for tensor in tensors} - {1}
    if len(sizes) > 1:
        raise ValueError(
            "Tensors of a batch must agree in their first dimension, the example, to be taken apart; got shapes "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)}. Use a dataloader with batch_size=1."
        )
    return sizes.pop() if sizes else 1


def _take(batch: Any, index: int, size: int) -> Any:
    """One example of a batch of `size`, as a batch of one."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _take(value, index, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if len(batch) == size and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
            return batch[index : index + 1]  # such as one text for each example
        return type(batch)(_take(value, index, size) for value in batch)
    return batch


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings become plain dictionaries."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _plain(batch))
