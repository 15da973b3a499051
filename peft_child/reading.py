"""Values that were read from buffers, to be read again only if something else has been written there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


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


class ReadBuffers(nn.ModuleDict, Generic[T]):
    """By adapter and parameter, a buffer that travels with the state dict, and what was read from it."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[str, str], Read[T]] = {}

    def add_adapter(self, adapter_name: str) -> None:
        """Make a place for the buffers of an adapter."""
        self[adapter_name] = BufferDict(persistent=True)

    def of(self, adapter_name: str) -> BufferDict:
        """The buffers of an adapter by parameter."""
        return cast(BufferDict, self[adapter_name])

    def read_again(self) -> None:
        """Read all buffers when they are needed next, after writes that autograd does not count."""
        self._known = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles read their own buffers."""
        return {**self.__dict__, "_known": {}}


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
