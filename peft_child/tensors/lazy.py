"""A mapping that computes its items on every access and keeps none: memory is that of one item at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """Named items, each computed on every access.

    Args:
        names: The names, in order.
        compute: Returns the item of a name.
        loop: Wraps every loop over the names, as a progress bar does.
    """

    def __init__(
        self,
        names: Iterable[str],
        compute: Callable[[str], T],
        loop: Callable[[list[str]], Iterable[str]] = lambda names: names,
    ) -> None:
        self._names = dict.fromkeys(names)  # an ordered set
        self._compute = compute
        self._loop = loop

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the default of Mapping would compute the item

    def __iter__(self) -> Iterator[str]:
        yield from self._loop(list(self._names))

    def __len__(self) -> int:
        return len(self._names)


def read_ahead(items: Mapping[str, T], names: Iterable[str]) -> Iterator[T]:
    """The items of some names, each computed in a second thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:  # one thread: memory is that of two items
        coming: Future[T] | None = None
        for name in names:
            ready, coming = coming, thread.submit(items.__getitem__, name)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
