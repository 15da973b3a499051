"""Squared gradients of the examples of a batch, from parts that are much smaller than the gradients.

For each example, the gradient of a linear layer's weight is the product of the output's gradient and the input. Such
products are computed tile by tile: all examples are added to one tile of the scores before the next, so that it stays
in the cache, and the scores are read and written once for a batch instead of once for an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_child.tensors.channels import ChannelLayout


_TILE = 2**19  # entries of one example's gradient that stay in a CPU's cache with their scores
_DEVICE_TILE = 2**26  # entries of all examples' gradients that other devices hold at a time
_ROWS = 64  # matrix products are slow with fewer
_FIRST = 16  # entries of a token's gradient that nearly always show whether it is zero


class Product(NamedTuple):
    """Gradients of a matrix: `left[b].T @ right[b]` is that of example b.

    Attributes:
        left: Shape `(examples, tokens, rows)`.
        right: Shape `(examples, tokens, columns)`.
        tokens: For each example the tokens that count; the others add nothing to its gradient.
    """

    left: Tensor
    right: Tensor
    tokens: list[slice]

    def of(self, examples: slice, rows: slice) -> Tensor:
        """Some rows of the gradients of some examples, shape `(examples, rows, columns)`."""
        if examples.stop - examples.start > 1:  # one product for all, so no tokens can be left out
            return self.left[examples, :, rows].mT @ self.right[examples]
        only, tokens = examples.start, self.tokens[examples.start]
        return (self.left[only, tokens, rows].T @ self.right[only, tokens]).unsqueeze(0)


class Rows(NamedTuple):
    """Gradients of a matrix of which every token uses one row, as in an embedding.

    Attributes:
        ids: The row of each token, shape `(examples, tokens)`.
        values: The gradient of each token's row, shape `(examples, tokens, columns)`.
        height: Number of rows of the matrix.
    """

    ids: Tensor
    values: Tensor
    height: int

    def of(self, examples: slice, rows: slice) -> Tensor:
        """Some rows of the gradients of some examples, shape `(examples, rows, columns)`."""
        ids, values = self.ids[examples], self.values[examples]
        start, stop, _ = rows.indices(self.height)
        found = values.new_zeros(len(ids), stop - start, values.shape[-1])
        example, token = ((ids >= start) & (ids < stop)).nonzero(as_tuple=True)
        return found.index_put_((example, ids[example, token] - start), values[example, token], accumulate=True)


class Whole(NamedTuple):
    """Gradients as they are, for small parameters.

    Attributes:
        gradients: Shape `(examples, *shape of the parameter)`.
    """

    gradients: Tensor

    def of(self, examples: slice, rows: slice) -> Tensor:
        """Some rows of the gradients of some examples."""
        return self.gradients[examples, rows]


class Each(NamedTuple):
    """Gradients that are computed example by example.

    Attributes:
        compute: From the number of an example to its gradient, in the shape of the parameter.
    """

    compute: Callable[[int], Tensor]

    def of(self, examples: slice, rows: slice) -> Tensor:
        """Some rows of the gradients of some examples."""
        return torch.stack([self.compute(example)[rows] for example in range(examples.start, examples.stop)])


Part = Product | Rows | Whole | Each


def product(left: Tensor, right: Tensor, gradients: Tensor) -> Product:
    """A product, without the tokens before the first and after the last one whose gradient is not zero.

    Padding gets no gradient; where a classifier reads one token only, such as the first, no other gets one.
    """
    examples, tokens = gradients.shape[:2]
    if gradients.device.type != "cpu":  # to read the numbers of tokens would synchronise with the device
        return Product(left, right, [slice(0, tokens)] * examples)
    if gradients.dtype.itemsize < 4:  # CPUs are slow with low precision
        left, right = left.float(), right.float()
    reached = (gradients[..., :_FIRST] != 0).any(-1)
    unclear = ~reached
    reached[unclear] = (gradients[unclear] != 0).any(-1)
    first = reached.byte().argmax(1).tolist()
    last = reached.byte().flip(1).argmax(1).tolist()
    any_reached = reached.any(1).tolist()
    spans = zip(first, last, any_reached, strict=True)
    return Product(
        left, right, [slice(start, tokens - left_out if some else start) for start, left_out, some in spans]
    )


def add_squares(
    score: Tensor,
    parts: Sequence[Part],
    weights: Sequence[float],
    device: torch.device,
    layout: ChannelLayout | None = None,
) -> None:
    """Add the weighted squares of the gradients of a batch's examples to a parameter's scores.

    Args:
        score: Float32, contiguous, in the shape of the parameter, on any device.
        parts: The gradients are their sum: one part for each use of the parameter.
        weights: A factor for the square of each example's gradient; examples with the factor 0 do not count.
        device: Where the gradients are.
        layout: If given, add the sums over the entries of each input channel instead, shape `(number of channels,)`.
    """
    # The channel sums of a batch are added up on their own first, which is more precise and costs little.
    room = score if score.device == device and layout is None else torch.zeros_like(score, device=device)
    only = parts[0] if len(parts) == 1 else None
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) == len(parts) and (layout is None or layout.outer == 1):
        numbers, factors, sums = _summed_rows(room, rows, weights)
        squares = sums.square_() if layout is None else sums.square_().sum(1, keepdim=True)
        room.view(len(room), -1).index_add_(0, numbers, squares.mul_(factors.unsqueeze(1)))
    elif layout is not None:
        _add_channels(room, layout, parts, weights)
    elif all(isinstance(part, Whole) for part in parts):
        total = sum(part.of(slice(0, len(weights)), slice(None)).float() for part in parts)
        room.add_(_weighted(weights, total))  # type: ignore[arg-type]
    elif isinstance(only, Product) and all(span.stop - span.start <= 1 for span in only.tokens):
        _add_outer(room, only, weights)
    else:
        _add_tiles(room, parts, weights)
    if room is not score:
        score.add_(room.to(score.device))


def _add_channels(score: Tensor, layout: ChannelLayout, parts: Sequence[Part], weights: Sequence[float]) -> None:
    """Add the weighted squares, summed over the channels."""
    only = parts[0] if len(parts) == 1 else None
    if not isinstance(only, Product):
        for example, weight in enumerate(weights):
            if weight:
                gradient = _summed(parts, slice(example, example + 1), slice(None))[0]
                score.add_(layout.sums(gradient.float().square()), alpha=weight)
        return
    lengths = [span.stop - span.start for span in only.tokens]
    common = slice(min(span.start for span in only.tokens), max(span.stop for span in only.tokens))
    # All examples at once, with the tokens that any of them uses, unless that is much more work.
    if len(weights) * (common.stop - common.start) ** 2 <= 2 * sum(length**2 for length in lengths):
        score.addmv_(_channel_sums(only, layout, slice(0, len(weights)), common).T, score.new_tensor(weights))
        return
    for example, weight in enumerate(weights):
        if weight:
            sums = _channel_sums(only, layout, slice(example, example + 1), only.tokens[example])
            score.add_(sums[0], alpha=weight)


def _channel_sums(part: Product, layout: ChannelLayout, examples: slice, tokens: slice) -> Tensor:
    """Sums over the channels of the squared gradients of some examples, shape `(examples, channels)`.

    With inputs x and output gradients d of an example's tokens, the sum over column j of the squares of `d.T @ x` is
    `x_j.T @ (d @ d.T) @ x_j`, which needs no gradient of the whole matrix. The cheaper of the two is computed.
    """
    left, right = part.left[examples, tokens].float(), part.right[examples, tokens].float()
    if layout.are_rows(left.shape[2]):
        left, right = right, left  # channels, here rows, are columns of the transpose
    # With t tokens, a matrix (m, n) takes t * t * (m + n) multiplications this way, and t * m * n the other way.
    if left.shape[1] * (left.shape[2] + right.shape[2]) < layout.numel:
        return (left @ left.mT @ right).mul_(right).sum(1).clamp_(min=0)  # rounding may leave less than nothing
    # One gradient at a time, since they are large.
    return torch.stack([(each.T @ other).square_().sum(0) for each, other in zip(left, right, strict=True)])


def _add_tiles(score: Tensor, parts: Sequence[Part], weights: Sequence[float]) -> None:
    """Compute gradients tile by tile: of one example at a time on a CPU, of all on other devices."""
    at_once = 1 if score.device.type == "cpu" or any(isinstance(part, Each) for part in parts) else len(weights)
    is_whole = not all(isinstance(part, (Product, Rows)) for part in parts)
    for rows in [slice(0, len(score))] if is_whole else _tiles(score, at_once):
        tile = score[rows]
        for start in range(0, len(weights), at_once):
            chosen = weights[start : start + at_once]
            if any(chosen):
                examples = slice(start, start + len(chosen))
                gradient = _summed(parts, examples, rows)
                if len(chosen) == 1:
                    gradient = gradient[0].float()
                    tile.addcmul_(gradient, gradient, value=chosen[0])
                else:
                    tile.add_(_weighted(chosen, gradient.float()))


def _summed(parts: Sequence[Part], examples: slice, rows: slice) -> Tensor:
    gradient = parts[0].of(examples, rows)
    for part in parts[1:]:
        gradient = gradient + part.of(examples, rows)
    return gradient


def _tiles(score: Tensor, at_once: int) -> Iterator[slice]:
    limit = _TILE if score.device.type == "cpu" else _DEVICE_TILE // at_once
    height = max(_ROWS, limit * len(score) // score.numel() // _ROWS * _ROWS)
    for start in range(0, len(score), height):
        yield slice(start, min(start + height, len(score)))


def _add_outer(score: Tensor, part: Product, weights: Sequence[float]) -> None:
    """One token for each example: the square of `l.T @ r` is that of l, times that of r."""
    # An empty span starts at a token whose gradient is zero, which adds nothing.
    token = torch.tensor([span.start for span in part.tokens], device=score.device)
    example = torch.arange(len(token), device=score.device)
    left, right = (side[example, token].float().square() for side in (part.left, part.right))
    score.addmm_((left * left.new_tensor(weights).unsqueeze(1)).T, right)


def _summed_rows(room: Tensor, parts: Sequence[Rows], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """For each row that an example uses: its number, the weight of the example, and the gradient of the row."""
    ids = torch.cat([part.ids for part in parts], 1)
    values = torch.cat([part.values for part in parts], 1)
    keys = ids + len(room) * torch.arange(len(ids), device=ids.device).unsqueeze(1)  # differ between examples
    unique, positions = keys.unique(return_inverse=True)
    sums = torch.zeros(len(unique), values.shape[-1], device=room.device)
    sums.index_add_(0, positions.flatten(), values.flatten(0, 1).float())
    return unique % len(room), sums.new_tensor(weights)[unique // len(room)], sums


def _weighted(weights: Sequence[float], gradients: Tensor) -> Tensor:
    """Weighted sum over the examples of their squared gradients."""
    found: Tensor = torch.tensordot(gradients.new_tensor(weights), gradients.square(), 1)
    return found
