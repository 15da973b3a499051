"""The gradient mask of task-free Child-Tuning: 0 or 1/p for every entry, drawn anew at every optimizer step.

The mask of a tensor is a pure function of a seed, the number of optimizer steps done, and the tensor's name. So all
micro-batches of a step and all processes use the same mask, no mask is stored, and a resumed run draws the masks that
the interrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.delta import check_share


PACKED_SIZE = 4


class GradientMask(NamedTuple):
    """A Bernoulli mask over gradients, scaled to keep their mean (Child-Tuning_F; Xu et al., 2021).

    A gradient g of one entry becomes `g * M / p`, with M = 1 with probability p, else 0. Let the gradient of a batch
    of B examples have the mean mu and the variance s^2 / B. The update of SGD with learning rate lr has the mean

        -lr * mu

    as without a mask, since E[M] / p = 1; and, since E[M^2] = p and hence E[(g M / p)^2] = (mu^2 + s^2 / B) / p, the
    variance

        lr^2 * (s^2 / (B * p) + (1 - p) / p * mu^2)

    which is Theorem 1 of the paper: the mask adds noise, most of all where the gradient is large.

    With `by_channel` all entries of an input channel share one M.

    Attributes:
        density: The probability p, in (0, 1].
        seed: Non-negative, below 2**63.
        every: Optimizer steps with the same mask.
        step: Optimizer steps done.
        by_channel: Whether whole input channels keep their gradients, and not single entries.
    """

    density: float
    seed: int = 0
    every: int = 1
    step: int = 0
    by_channel: bool = False

    def draw(self, name: str, numel: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw which entries, or channels, keep their gradient at the present step.

        Args:
            name: Name of the tensor, so that tensors of equal shape have different masks.
            numel: Number of its entries, or channels.
            device: Where the mask is drawn; the random numbers of CPUs and of GPUs differ.

        Returns:
            bool, shape `(numel,)`.
        """
        # A hash, so that neighbouring seeds, steps and names give unrelated masks.
        text = f"{self.seed}:{self.step // self.every}:{name}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        device = torch.device(device)
        if device.type == "cpu":
            return _draw_on_cpu(numel, self.density, seed)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(numel, dtype=torch.bool, device=device).bernoulli_(self.density, generator=generator)

    def apply(self, name: str, gradient: Tensor, channels: ChannelLayout | Tensor | None = None) -> Tensor:
        """The masked and scaled gradient, a new tensor of the same shape and dtype.

        A gradient that is not finite stays so, or becomes NaN where it is masked, for a `GradScaler` to notice.

        Args:
            name: Name of the tensor.
            gradient: The gradient.
            channels: With `by_channel`, how the gradient is divided: a layout of its entries, or the number of each
                entry's channel, counted from 0, int64, in the shape of the gradient.
        """
        if isinstance(channels, ChannelLayout):
            kept = self.draw(name, channels.number, gradient.device).view(channels.groups, 1, channels.per_group, 1)
            parts = gradient.view(channels)
            return (kept.to(gradient.dtype) * parts).div_(self.density).view(gradient.shape)
        if channels is not None:
            kept = self.draw(name, int(channels.max()) + 1, gradient.device)[channels]
        else:
            kept = self.draw(name, gradient.numel(), gradient.device).view(gradient.shape)
        return kept.to(gradient.dtype).mul_(gradient).div_(self.density)

    def pack(self) -> Tensor:
        """The mask as a tensor, int64, shape `(4,)`: steps done, steps per mask, seed, bits of the density.

        The density is negative if the mask is by channel.
        """
        # All are integers, since casting a model to half precision rounds floating point tensors only.
        (density,) = struct.unpack("<q", struct.pack("<d", -self.density if self.by_channel else self.density))
        return torch.tensor([self.step, self.every, self.seed, density], dtype=torch.int64)

    @classmethod
    def unpack(cls, packed: Tensor) -> GradientMask:
        """Read what `pack` wrote.

        Raises:
            ValueError: If the tensor or a value in it is not valid.
        """
        if packed.shape != (PACKED_SIZE,) or packed.dtype != torch.int64:
            raise ValueError(
                f"A gradient mask is int64 of shape ({PACKED_SIZE},), got {packed.dtype} {tuple(packed.shape)}."
            )
        step, every, seed, bits = packed.tolist()
        (density,) = struct.unpack("<d", struct.pack("<q", bits))
        try:
            return cls(abs(density), seed, every, step, by_channel=density < 0).checked()
        except ValueError as error:
            raise ValueError(f"A gradient mask cannot be read. {error}") from error

    def checked(self) -> GradientMask:
        """The mask itself, if its values are valid.

        Raises:
            ValueError: If the step or a setting is out of range; the message names the field of the configuration.
        """
        check_share("density", self.density)
        if not 0 <= self.seed < 1 << 63:  # it is packed as an int64
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")
        if self.every < 1:
            raise ValueError(f"resample_every must be a positive integer, got {self.every!r}.")
        if self.step < 0:
            raise ValueError(f"The step of a gradient mask must not be negative, got {self.step}.")
        return self

    def describe(self) -> str:
        """The settings, without the step."""
        unit = " of input channels" if self.by_channel else ""
        return f"density {self.density}{unit}, seed {self.seed}, a new mask every {self.every} steps"


def _draw_on_cpu(numel: int, density: float, seed: int) -> Tensor:
    """One random byte decides for most entries; the few that it leaves undecided get 64 bits more."""
    source = np.random.SFC64(seed)  # numpy guarantees the same numbers in all versions
    threshold = int(density * 256)
    # Eight bytes of every 64 bits, in little-endian order on every machine.
    random = source.random_raw((numel + 7) // 8).astype("<u8", copy=False).view(np.uint8)[:numel]
    kept = random < threshold
    undecided = np.flatnonzero(random == threshold)
    rest = np.uint64((density * 256 - threshold) * 2.0**64)
    kept[undecided] = source.random_raw(undecided.size) < rest
    return torch.from_numpy(kept)
