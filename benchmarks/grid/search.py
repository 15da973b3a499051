"""Which learning rates a method is tried at.

Where the best rate tried is the largest or the smallest, the search goes on, so that no method is held back by the
rates that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST_RATES = 5  # tried for one method on one task


class Method(NamedTuple):
    """What is trained.

    Attributes:
        name: As in tables.
        options: For the script.
        rates: Learning rates to begin with, neighbours in LADDER.
        script: A name in `runs.SCRIPTS`.
        like: The method whose search the learning rate is taken from, instead of one of its own.
    """

    name: str
    options: tuple[str, ...]
    rates: tuple[float, ...] = ()
    script: str = "glue"
    like: Method | None = None


def searched(method: Method) -> Method:
    """The method whose search counts."""
    return method.like or method


def only_named(methods: tuple[Method, ...], names: tuple[str, ...]) -> tuple[Method, ...]:
    """The methods with these names, or all if none is given.

    Raises:
        ValueError: If no method has any of the names.
    """
    chosen = tuple(method for method in methods if not names or method.name in names)
    if not chosen:
        known = ", ".join(method.name for method in methods)
        raise ValueError(f"--methods must name some of {known}; got {', '.join(names)}.")
    return chosen


def rates_to_try(method: Method, best_of: Callable[[Sequence[float]], float | None]) -> list[float]:
    """The rates to try, as far as can be said now.

    Args:
        method: With the rates to begin with.
        best_of: The best of some rates, or None as long as some of them have not been tried.
    """
    first, last = (LADDER.index(rate) for rate in (searched(method).rates[0], searched(method).rates[-1]))
    while last - first + 1 < MOST_RATES:
        best = best_of(LADDER[first : last + 1])
        if best == LADDER[last] and last + 1 < len(LADDER):
            last += 1
        elif best == LADDER[first] and first:
            first -= 1
        else:
            break
    return list(LADDER[first : last + 1])
