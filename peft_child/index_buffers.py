"""The encoded indices of a layer's child networks as buffers, decoded once and kept until something is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_child.codec import decode
from peft_child.reading import Read, ReadBuffers


class _Awaited(NamedTuple):
    """A block that is about to be loaded, with its positions."""

    block: Tensor
    indices: Tensor


class IndexBuffers(ReadBuffers[Tensor]):
    """By adapter and parameter, the encoded flat indices of a child network, uint8."""

    def __init__(self) -> None:
        super().__init__()
        self._awaited: dict[tuple[str, str], _Awaited] = {}

    def await_block(self, adapter_name: str, parameter: str, block: Tensor, indices: Tensor) -> None:
        """Keep the positions of a block that a loader is about to copy, so that it is not decoded again."""
        self._awaited[adapter_name, parameter] = _Awaited(block, _narrowed(indices))

    def remember(self, adapter_name: str, parameter: str, indices: Tensor) -> None:
        """Keep the positions that the present block holds."""
        block = self.of(adapter_name)[parameter]
        self._known[adapter_name, parameter] = Read.of(block, _narrowed(indices).to(block.device))

    def present(self, adapter_name: str, parameter: str) -> Tensor:
        """Flat indices, decoded again only if something else wrote the block.

        Args:
            adapter_name: An adapter of the layer.
            parameter: A parameter with a child.

        Returns:
            Indices, int32 or, for those that do not fit, int64, shape `(k,)`, on the device of the block.

        Raises:
            FormatError: If the block is damaged.
        """
        known = self._known.get((adapter_name, parameter))
        block = self.of(adapter_name)[parameter]
        if type(block) is not Tensor:  # torch.export traces with tensors that have no values
            if known is None:
                raise RuntimeError("Run the model once before torch.export, or call merge_and_unload() before it.")
        elif known is None or not known.holds(block):
            with torch.inference_mode(False):  # else they could never be used in training
                self.remember(adapter_name, parameter, self._read(adapter_name, parameter, block))
        return self.known(adapter_name, parameter)

    def known(self, adapter_name: str, parameter: str) -> Tensor:
        """The indices that were decoded last, without a question about the block."""
        return self._known[adapter_name, parameter].value

    def forget(self, adapter_name: str) -> None:
        """Decode the blocks of an adapter when they are needed next."""
        self._known = {key: known for key, known in self._known.items() if key[0] != adapter_name}
        self._awaited = {key: awaited for key, awaited in self._awaited.items() if key[0] != adapter_name}

    def _read(self, adapter_name: str, parameter: str, block: Tensor) -> Tensor:
        awaited = self._awaited.pop((adapter_name, parameter), None)
        if awaited is not None and torch.equal(awaited.block.to(block.device), block):
            return awaited.indices
        return torch.from_numpy(decode(block.cpu().numpy().data))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As torch's; what is loaded is decoded anew, which compiled code notices by its absence."""
        self._known = {key: known for key, known in self._known.items() if prefix + ".".join(key) not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles decode their blocks again."""
        return {**super().__getstate__(), "_awaited": {}}


def _narrowed(indices: Tensor) -> Tensor:
    """Increasing flat indices as they are kept in memory: int32 if they all fit."""
    fits = not indices.numel() or int(indices[-1]) <= torch.iinfo(torch.int32).max
    return indices.int() if fits else indices
