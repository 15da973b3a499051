"""What the input channels of a parameter are, by the kind of the module that owns it."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.partitioned import shape_of


ENTRY, INPUT_CHANNEL = "entry", "input_channel"
GRANULARITIES = (ENTRY, INPUT_CHANNEL)

# Modules whose weight has its inputs along the first dimension, not the second.
_TRANSPOSED = (nn.Embedding, Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED[2:])


def layout_of(module: nn.Module, key: str, parameter: nn.Parameter) -> ChannelLayout:
    """How the input channels of a parameter lie in it.

    A channel is all weights that read one input feature: a column of a linear weight, the row of a token in an
    embedding, an input channel of a convolution with its kernels, a feature of one expert. A bias reads the constant
    input 1, so the whole bias is one channel; in other vectors, such as the weights of norms, every entry is a channel
    of its own.

    Args:
        module: The module that owns the parameter.
        key: The parameter's name in the module.
        parameter: The parameter, of any shape.
    """
    shape = shape_of(parameter)
    if len(shape) == 3 and not isinstance(module, _CONVOLUTIONS):  # experts: (experts, out, in), or (experts, in, out)
        is_transposed = getattr(module, "is_transposed", False)
        return ChannelLayout(shape[0], 1, *shape[1:]) if is_transposed else ChannelLayout(*shape, 1)
    return ChannelLayout.of_shape(shape, is_bias=key.endswith("bias"), by_rows=isinstance(module, _TRANSPOSED))
