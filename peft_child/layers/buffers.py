"""Index blocks and gradient masks, held in buffers so that state dicts carry them, with a cache of their values.

A buffer is decoded once, and again only after something else was written into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_child.tensors.channels import Channels
from peft_child.tensors.codec import decode_index
from peft_child.tensors.compose import changes_in
from peft_child.tensors.gradient_mask import GradientMask


T = TypeVar("T")


class _ReadBuffers(nn.ModuleDict, Generic[T]):
    """Buffers by adapter and parameter, each with a cache of its decoded value."""

    def __init__(self) -> None:
        super().__init__()
        # The cache, by adapter and parameter: the buffer, its count of in-place changes when decoded, and the value.
        self._known: dict[tuple[str, str], tuple[Tensor, int, T]] = {}

    def add_adapter(self, adapter_name: str) -> None:
        """Make a place for the buffers of an adapter."""
        self[adapter_name] = BufferDict(persistent=True)

    def of(self, adapter_name: str) -> BufferDict:
        """The buffers of an adapter by parameter."""
        return cast(BufferDict, self[adapter_name])

    def known(self, adapter_name: str, parameter: str) -> T:
        """What was read last; the buffer is not looked at."""
        return self._known[adapter_name, parameter][2]

    def present(self, adapter_name: str, parameter: str) -> T:
        """What the buffer holds now; writes that autograd does not count, such as broadcasts, go unnoticed."""
        known = self._known.get((adapter_name, parameter))
        buffer = self.of(adapter_name)[parameter]
        if type(buffer) is not Tensor:  # torch.export traces with tensors that have no values
            if known is None:
                raise RuntimeError("Run the model once before torch.export, or call merge_and_unload() before it.")
        elif known is None or known[0] is not buffer or known[1] != changes_in(buffer):
            with torch.inference_mode(False):  # a value decoded as an inference tensor could not be used in training
                self.remember(adapter_name, parameter, self._read(buffer))
        return self.known(adapter_name, parameter)

    def remember(self, adapter_name: str, parameter: str, value: T) -> None:
        """Keep what the buffer holds now."""
        buffer = self.of(adapter_name)[parameter]
        self._known[adapter_name, parameter] = buffer, changes_in(buffer), value

    def clear_cache(self, adapter_name: str | None = None) -> None:
        """Clear the cache, or that of one adapter, so that buffers are decoded again when next needed."""
        self._known = {key: known for key, known in self._known.items() if adapter_name not in (None, key[0])}

    def _read(self, buffer: Tensor) -> T:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As torch's; also clears the cache of the loaded buffers, so that torch.compile traces them again."""
        self._known = {key: known for key, known in self._known.items() if prefix + ".".join(key) not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache: copies and unpickled objects decode their own buffers."""
        return {**self.__dict__, "_known": {}}


class IndexBuffers(_ReadBuffers[Tensor | Channels]):
    """Encoded positions, uint8; decoded to int32, to int64 where they do not fit, or to channels of one group.

    The decoded value is on the buffer's device. Decoding raises a `FormatError` if a block is damaged.
    """

    def remember(self, adapter_name: str, parameter: str, value: Tensor | Channels) -> None:
        """Keep the positions that the buffer holds now."""
        device = self.of(adapter_name)[parameter].device
        if isinstance(value, Channels):
            value = value._replace(chosen=value.chosen.to(device))
        else:
            fit = not value.numel() or int(value[-1]) <= torch.iinfo(torch.int32).max
            value = (value.int() if fit else value).to(device)
        super().remember(adapter_name, parameter, value)

    def _read(self, buffer: Tensor) -> Tensor | Channels:
        block = buffer.cpu().numpy().data
        layout, found = decode_index(block)
        if layout is None:
            return torch.from_numpy(found)
        channels = torch.from_numpy(found)
        return Channels(layout, channels) if layout.groups == 1 else layout.positions(channels)


class MaskBuffers(_ReadBuffers[GradientMask]):
    """Packed gradient masks, int64, for the deltas that have one."""

    @torch.no_grad()
    def count_step(self, adapter_name: str, parameter: str) -> None:
        """Go on to the mask of the next optimizer step."""
        mask = self.present(adapter_name, parameter)
        self.of(adapter_name)[parameter][:1].add_(1)  # `GradientMask.pack` puts the number of steps first
        self.remember(adapter_name, parameter, mask._replace(step=mask.step + 1))

    def _read(self, buffer: Tensor) -> GradientMask:
        return GradientMask.unpack(buffer)
