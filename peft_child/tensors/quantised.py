"""Quantised weights that look like dense ones: tensor subclasses that can be dequantised (torchao)."""

from __future__ import annotations

from torch import Tensor


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that packs its values and can unpack them."""
    return type(tensor).dequantize is not Tensor.dequantize


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor, unpacked if they are packed; otherwise the tensor itself."""
    return tensor.dequantize() if is_quantised(tensor) else tensor
