"""The gradient masks of a layer's deltas as buffers, which travel with its state dict and so with checkpoints."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from peft_child.mask import GradientMask
from peft_child.reading import Read


class MaskBuffers(nn.ModuleDict):
    """By adapter and parameter, the packed mask of a delta's gradient, if it is masked."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[str, str], Read[GradientMask]] = {}

    def add_adapter(self, adapter_name: str) -> None:
        """Make a place for the masks of an adapter."""
        self[adapter_name] = BufferDict(persistent=True)

    def of(self, adapter_name: str) -> BufferDict:
        """The packed masks of an adapter by parameter."""
        return cast(BufferDict, self[adapter_name])

    def put(self, adapter_name: str, parameter: str, mask: GradientMask, device: torch.device) -> None:
        """Mask the gradient of a delta from now on."""
        self.of(adapter_name)[parameter] = mask.pack().to(device)

    def present(self, adapter_name: str, parameter: str) -> GradientMask:
        """The present mask of a delta's gradient, read again only if something else wrote the buffer."""
        packed = self.of(adapter_name)[parameter]
        known = self._known.get((adapter_name, parameter))
        if known is None or not known.holds(packed):
            known = self._known[adapter_name, parameter] = Read.of(packed, GradientMask.unpack(packed))
        return known.value

    @torch.no_grad()
    def count_step(self, adapter_name: str, parameter: str) -> None:
        """Go on to the mask of the next optimizer step."""
        mask = self.present(adapter_name, parameter)
        packed = self.of(adapter_name)[parameter]
        packed[:1].add_(1)
        self._known[adapter_name, parameter] = Read.of(packed, mask._replace(step=mask.step + 1))

    def read_again(self) -> None:
        """Read all masks from their buffers when they are needed next."""
        self._known = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles count steps on their own."""
        return {**self.__dict__, "_known": {}}
