"""Child networks of whole input channels: all the weights of a tensor that read one input feature.

The gradient of a channel's weights needs one input feature and no others, and the index of a child network is a short
list of channel numbers. So channels train as fast as LoRA, and are chosen without the gradient of any weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.tensors.topk import check_scores


class ChannelLayout(NamedTuple):
    """A contiguous tensor seen as `(groups, outer, per_group, inner)`; channel `g * per_group + c` is `[g, :, c, :]`.

    A linear weight `(out, in)` is `(1, out, in, 1)`: a channel is a column. An embedding is `(1, 1, tokens, width)`: a
    channel is the row of a token. A convolution is `(1, out, in, kernel)`. In stacked experts each expert is a group.
    """

    groups: int
    outer: int
    per_group: int
    inner: int

    @classmethod
    def of_shape(cls, shape: Sequence[int], *, is_bias: bool, by_rows: bool) -> ChannelLayout:
        """The layout of a tensor that is not a stack of experts.

        Args:
            shape: Its shape.
            is_bias: Whether a vector is a bias, which reads the constant input 1 and is one channel. In other vectors
                every entry is a channel.
            by_rows: Whether the first dimension of a matrix counts its inputs, and not the second one.
        """
        numel = math.prod(shape)
        if len(shape) < 2:
            return cls(1, 1, 1, numel) if is_bias else cls(1, 1, numel, 1)
        if by_rows:
            return cls(1, 1, shape[0], math.prod(shape[1:]))
        return cls(1, shape[0], shape[1], math.prod(shape[2:]))

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return self.groups * self.outer * self.per_group * self.inner

    @property
    def number(self) -> int:
        """Number of channels."""
        return self.groups * self.per_group

    @property
    def size(self) -> int:
        """Entries of a channel."""
        return self.outer * self.inner

    def are_rows(self, height: int) -> bool:
        """Whether the channels of a matrix of this height are its rows, and not its columns."""
        return self.outer == 1 and self.per_group == height and self.inner * height > 1  # 1 x 1: columns

    def sums(self, values: Tensor) -> Tensor:
        """The sum of each channel of a tensor of `numel` entries, shape `(number,)`."""
        return values.reshape(self).sum((1, 3)).reshape(-1)

    def positions(self, channels: Tensor) -> Tensor:
        """Strictly increasing flat positions, int64, of all entries of channels with strictly increasing numbers."""
        group, channel = channels // self.per_group, channels % self.per_group
        first = ((group * self.outer) * self.per_group + channel) * self.inner
        device = channels.device
        steps = torch.arange(self.outer, device=device).view(-1, 1, 1) * (self.per_group * self.inner)
        found = steps + first.view(1, -1, 1) + torch.arange(self.inner, device=device)
        # `found` is ordered by row, then channel, then entry inside. With several groups that is not yet increasing:
        # the first row of a later group stands before the second row of an earlier one.
        return found.reshape(-1) if self.groups == 1 else found.reshape(-1).sort().values

    def channel_of(self, positions: Tensor) -> Tensor:
        """The channel of each flat position, int64."""
        row, inside = positions // (self.per_group * self.inner), positions % (self.per_group * self.inner)
        return row // self.outer * self.per_group + inside // self.inner

    def holding(self, positions: Tensor) -> Tensor:
        """The channels that flat positions consist of, int64, strictly increasing.

        Raises:
            ValueError: If a channel is not complete.
        """
        found: Tensor
        found, entries = self.channel_of(positions).unique(return_counts=True)
        if not bool((entries == self.size).all()):
            raise ValueError("A child network of input channels must hold whole channels; this one cuts some.")
        return found


class Channels(NamedTuple):
    """Chosen channels of a tensor with a single group; used in place of the positions of their entries.

    Attributes:
        layout: How the tensor is divided into channels.
        chosen: Numbers of the channels, int64, shape `(m,)`, strictly increasing.
    """

    layout: ChannelLayout
    chosen: Tensor

    def positions(self) -> Tensor:
        """Flat positions of all entries, int64."""
        return self.layout.positions(self.chosen)

    def of(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor as `(outer, per_group, inner)`, so that dimension 1 counts the channels."""
        return tensor.view(*self.layout[1:])

    def as_block(self, delta: Tensor) -> Tensor:
        """A delta of these channels as `(outer, m, inner)`."""
        return delta.view(self.layout.outer, -1, self.layout.inner)

    def add_to(self, tensor: Tensor, delta: Tensor) -> None:
        """Add a delta of these channels to a contiguous tensor of the same dtype, in place."""
        total, block = self.of(tensor), self.as_block(delta)
        if self.layout.inner == 1:  # torch adds to columns of a matrix ten times as fast as in three dimensions
            total, block = total.squeeze(2), block.squeeze(2)
        total.index_add_(1, self.chosen, block)


def choose_channels(
    scores: Mapping[str, Tensor], layouts: Mapping[str, ChannelLayout], budget: int, total: int | None = None
) -> dict[str, Tensor]:
    """Choose whole channels, in the order of their mean score per entry, until the next one would exceed the budget.

    Ties go to the earlier tensor in `scores`, then to the channel with the smaller number.

    Args:
        scores: Sum of the scores of each channel's entries, finite and not negative, shape `(number,)`, by name.
        layouts: How each tensor is divided, by name.
        budget: Largest number of entries to choose.
        total: Number of entries that a density counts, for errors; by default those of all tensors.

    Returns:
        Numbers of the chosen channels by name, int64, strictly increasing, on the CPU; empty where none is chosen.

    Raises:
        ValueError: If the channel with the largest score exceeds the budget, or scores are not what `check_scores`
            wants.
    """
    for name, score in scores.items():
        check_scores(name, score)
    sizes = torch.cat([torch.full((layouts[name].number,), layouts[name].size) for name in scores])
    # In float64: rounded to float32, different means of channels of different sizes could tie.
    means = torch.cat([score.detach().flatten().double().cpu() / layouts[name].size for name, score in scores.items()])
    order = means.sort(descending=True, stable=True).indices
    # A prefix of the order, so that a larger budget keeps all that a smaller one chooses.
    taken = order[: int((sizes[order].cumsum(0) <= budget).sum())]
    if not taken.numel():
        total = total or sum(layouts[name].numel for name in scores)
        least = int(sizes[order[0]]) / total
        # Four significant digits, rounded up: a density rounded down would be too small again.
        digits = 10 ** (3 - math.floor(math.log10(least)))
        raise ValueError(
            f"The density is too small for one input channel: it allows {budget} of {total} entries, and the channel "
            f"with the largest score has {int(sizes[order[0]])}. The smallest density that works is "
            f"{math.ceil(least * digits) / digits}."
        )
    chosen = torch.zeros(len(means), dtype=torch.bool).index_fill_(0, taken, True)
    parts = chosen.split([layouts[name].number for name in scores])
    return {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}
