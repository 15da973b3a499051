"""The gradient masks of a layer's deltas as buffers, which travel with its state dict and so with checkpoints."""

from __future__ import annotations

import torch

from peft_child.mask import GradientMask
from peft_child.reading import Read, ReadBuffers


class MaskBuffers(ReadBuffers[GradientMask]):
    """By adapter and parameter, the packed mask of a delta's gradient, if it is masked."""

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
