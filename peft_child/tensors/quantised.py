"""Quantised weights that look like dense ones: they know their shape, and can usually be unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PackedWeight(torch.Tensor):
    """The weight of a linear layer that keeps it packed (bitsandbytes, HQQ, GGUF): a dense tensor without values.

    It has the shape that the weight has once it is unpacked, and takes part in no computation; `dense` unpacks it.

    Attributes:
        module: The layer.
        unpack: Returns the values, float, shape `(out, in)`; None if nothing can unpack them (GPTQ, AWQ).
        passes_gradients: Whether the layer's own forward lets gradients through to its input.
    """

    module: nn.Module
    unpack: Callable[[], Tensor] | None
    passes_gradients: bool

    @staticmethod
    def __new__(
        cls,
        module: nn.Module,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor] | None,
        passes_gradients: bool,
    ) -> PackedWeight:
        """Stand for the weight of `module`, which computes in `dtype`."""
        self: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        self.module, self.unpack, self.passes_gradients = module, unpack, passes_gradients
        return self

    def dequantize(self) -> Tensor:
        """The values, in the dtype that the layer computes in.

        Raises:
            TypeError: If nothing can unpack them.
        """
        return self.unpacked().to(self.dtype)

    def unpacked(self) -> Tensor:
        """The values, as they are unpacked."""
        if self.unpack is None:
            raise TypeError(f"The weight of a {type(self.module).__name__} cannot be unpacked.")
        with torch.no_grad():
            return self.unpack().detach()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let it be detached; there is nothing to compute with."""
        if func is torch.ops.aten.detach.default:
            (packed,) = args
            return cls(
                packed.module, packed.shape, packed.dtype, packed.device, packed.unpack, packed.passes_gradients
            )
        raise RuntimeError(f"{func} was called with a packed weight: unpack it with `dequantize()`.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """What it stands for."""
        return f"PackedWeight({type(self.module).__name__}, {tuple(self.shape)}, {self.dtype}, {self.device})"


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that packs its values and can unpack them."""
    return type(tensor).dequantize is not Tensor.dequantize


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor, unpacked if they are packed; otherwise the tensor itself."""
    return tensor.dequantize() if is_quantised(tensor) else tensor
