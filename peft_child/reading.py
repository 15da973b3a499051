"""Values that were read from buffers, to be read again only if something else has been written there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor


T = TypeVar("T")


@dataclass(frozen=True)
class Read(Generic[T]):
    """What was read from a buffer, and what tells whether something else has been written into it since.

    Attributes:
        buffer: The buffer.
        version: Its number of changes, as autograd counts them.
        value: What it held.
    """

    buffer: Tensor
    version: int
    value: T

    @classmethod
    def of(cls, buffer: Tensor, value: T) -> Read[T]:
        """What a buffer holds now."""
        return cls(buffer, _version(buffer), value)

    def holds(self, buffer: Tensor) -> bool:
        """Whether that is still what this buffer holds, unless it was written unnoticed, as broadcasts do."""
        return self.buffer is buffer and self.version == _version(buffer)


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
