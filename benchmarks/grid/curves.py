"""Curves of what is learnt and forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


Curve = Sequence[tuple[float, float]]  # losses on new and old text, from the base model on


def old_where_new_is(curve: Curve, new: float) -> float | None:
    """The loss on old text where that on new text first comes down to a value.

    Args:
        curve: Losses on new and old text, interpolated between two points.
        new: The loss on new text.

    Returns:
        The loss on old text, that of the first point if it is below `new` already; None if it never comes down so far.
    """
    if curve[0][0] <= new:
        return curve[0][1]
    for (new_before, old_before), (new_after, old_after) in pairwise(curve):
        if new_after <= new < new_before:
            share = (new_before - new) / (new_before - new_after)
            return old_before + share * (old_after - old_before)
    return None
