"""The tensors of an adapter file: every child network is an index block and a delta, each checked against the other.

The format is written down in docs/format.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_child.tensors.codec import (
    HEADER_SIZE,
    FormatError,
    Header,
    decode_index,
    read_header,
    unchecked_header,
    with_delta_checksum,
)
from peft_child.tensors.delta import ChildSize, SparseDelta
from peft_child.tensors.distributed import check_has_values, whole
from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.partitioned import numel_of
from peft_child.tensors.quantised import is_quantised


DELTA, INDEX, MASK = "child_delta", "child_index", "child_mask"
KINDS = (DELTA, INDEX)
PREFIX = "base_model.model."
DELTA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StoredChild(NamedTuple):
    """The child network of one parameter as it is stored in a file.

    Attributes:
        delta: Change of the chosen entries, floating point, shape `(k,)`.
        block: Their encoded positions, uint8, shape `(bytes,)`.
        header: The header of the block.
        mask: The gradient mask at the end of training, if there was one.
    """

    delta: Tensor
    block: Tensor
    header: Header
    mask: GradientMask | None = None

    def size(self) -> ChildSize:
        """Its size; `checked_child` has verified the header."""
        return ChildSize(self.header.numel, self.header.size, self.block.numel())

    def sparse_delta(self, name: str) -> SparseDelta:
        """The child network; its shape is a matrix with the tensor's rows, since the file does not hold more.

        Args:
            name: Name of the parameter, for the error.

        Raises:
            FormatError: If the block holds other positions than its header says.
        """
        with _naming(name):
            layout, found = decode_index(self.block.cpu().numpy().data)
        indices = torch.from_numpy(found)
        positions = indices if layout is None else layout.positions(indices)
        shape = (self.header.numel // self.header.width, self.header.width)
        return SparseDelta(shape, positions, self.delta, self.header.fingerprint, layout)


def read_children(tensors: Mapping[str, Tensor]) -> tuple[dict[str, StoredChild], dict[str, Tensor]]:
    """Sort the tensors of an adapter file, and check those that belong to child networks.

    Args:
        tensors: By their names in the file, or in a model without adapter names.

    Returns:
        The child networks by name of the parameter in the base model, and all other tensors by their own names.

    Raises:
        FormatError: If a tensor is damaged, has a wrong dtype or shape, or lacks its counterpart.
    """
    keys, others = child_keys(tensors)
    children = {
        name: checked_child(name, {kind: tensors[key] for kind, key in pair.items()}) for name, pair in keys.items()
    }
    return children, {key: tensors[key] for key in others}


def child_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names of the tensors of each child network by kind, by name of the parameter; and all other names."""
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        path, kind, parameter = _split(key)
        if kind:
            pairs.setdefault(f"{path}.{parameter}", {})[kind] = key
        else:
            others.append(key)
    return pairs, others


def claimed_size(name: str, block: Any) -> ChildSize:
    """The size that a block's header claims, unchecked.

    Args:
        name: Name of the parameter.
        block: A uint8 tensor, or a slice of one in a file.

    Raises:
        FormatError: If it has no room for a header, or another dtype or number of dimensions.
    """
    shape = block.get_shape() if hasattr(block, "get_shape") else list(block.shape)
    if len(shape) != 1 or shape[0] < HEADER_SIZE:
        raise FormatError(
            f"The index block of '{name}' must be 1-D and have at least {HEADER_SIZE} bytes, got {shape}."
        )
    head = block[:HEADER_SIZE]
    if head.dtype != torch.uint8:
        raise FormatError(f"The index block of '{name}' must be uint8, got {head.dtype}.")
    header = unchecked_header(head.numpy().data)
    return ChildSize(header.numel, header.size, shape[0])


def stamped(tensors: Mapping[str, Tensor], delta_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter with the checksum of every delta written into its block, ready to be saved.

    Args:
        tensors: By their names in the file, or in a model.
        delta_dtype: Round float32 deltas to this dtype; by default nothing is rounded.

    Raises:
        RuntimeError: If a delta is offloaded.
        ValueError: If a delta is not finite, or a block was never filled: no reader would accept them.
    """
    result = dict(tensors)
    for key, block in tensors.items():
        path, kind, rest = key.rpartition(f".{INDEX}.")
        delta_key = f"{path}.{DELTA}.{rest}"
        delta = tensors.get(delta_key) if kind else None
        if delta is None:
            continue
        name = f"{path.removeprefix(PREFIX)}.{rest.rpartition('.')[2]}"
        check_has_values(f"The child network of '{name}'", delta)
        if not bool(block.any()):
            raise ValueError(f"The child network of '{name}' was neither chosen nor loaded: choose it before saving.")
        if delta_dtype is not None and delta.dtype == torch.float32:
            result[delta_key] = delta.to(delta_dtype)
        # Counted after the rounding, which may overflow.
        bad = result[delta_key].numel() - int(result[delta_key].isfinite().sum())
        if bad:
            raise ValueError(f"Deltas must be finite to be saved; {bad} values of '{name}' are not.")
        data = with_delta_checksum(block.cpu().numpy().data, checksum_of(result[delta_key]))
        result[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(block.device)
    return result


def checksum_of(delta: Tensor) -> int:
    """CRC-32 of a delta's little-endian bytes; never 0, which means unknown."""
    return zlib.crc32(delta.detach().cpu().contiguous().view(torch.uint8).numpy().data) or 1


def fingerprint_of(base: Tensor, indices: Tensor) -> int:
    """Fingerprint of the base values at some flat positions; 0 if they are quantised or offloaded.

    See `fingerprint_of_values`. If the base is sharded, every rank has to call this.
    """
    if base.is_meta or is_quantised(base):
        return 0
    base = whole(base.detach())
    return fingerprint_of_values(base.reshape(-1).index_select(0, indices.to(base.device)))


def fingerprint_of_values(values: Tensor) -> int:
    """32 bits of base values, the same whether a checkpoint is loaded as float32 or bfloat16.

    0, which means unknown, for float16: its rounding differs from that of the other two.
    """
    return 0 if values.dtype == torch.float16 else checksum_of(values.to(torch.bfloat16))


def fingerprints_differ(known: int, here: int) -> bool:
    """Whether two fingerprints are both known and differ."""
    return bool(known and here and known != here)


def _split(key: str) -> tuple[str, str, str]:
    """Path of the module in the base model, kind, and name of the parameter; no kind for other tensors.

    Takes out `.base_layer`, which the layers of other adapters add to the path.
    """
    for kind in (*KINDS, MASK):
        path, found, parameter = key.rpartition(f".{kind}.")
        if found and "." not in parameter:  # otherwise a module has this name
            # With a dot at the end, so that a last `.base_layer` is taken out as well.
            return f"{path}.".removeprefix(PREFIX).replace(".base_layer.", ".")[:-1], kind, parameter
    return key, "", ""


def checked_child(name: str, pair: Mapping[str, Tensor]) -> StoredChild:
    """Check the tensors of one child network, given by kind, against each other; the mask is optional."""
    for kind in KINDS:
        if kind not in pair:
            raise FormatError(
                f"The file has one tensor of the child of '{name}' without the other: {kind} is missing."
            )
    delta, block = pair[DELTA], pair[INDEX]
    if block.dtype != torch.uint8 or block.dim() != 1 or delta.dim() != 1 or delta.dtype not in DELTA_DTYPES:
        raise FormatError(
            f"The child of '{name}' must be a 1-D uint8 index block and a 1-D floating point delta, got "
            f"{block.dtype} {tuple(block.shape)} and {delta.dtype} {tuple(delta.shape)}."
        )
    with _naming(name):
        header = read_header(block.cpu().numpy().data)
        if header.size != delta.numel():
            raise FormatError(f"Its index has {header.size} positions and its delta {delta.numel()} values.")
        if header.delta_checksum and header.delta_checksum != checksum_of(delta):
            raise FormatError("The checksum of its delta does not match.")
        # A sum with a value that is not finite is not finite either, and a sum is many times as fast.
        if not (delta.sum().isfinite() or delta.isfinite().all()):
            raise FormatError("Its delta has a value that is not finite.")
        mask = GradientMask.unpack(pair[MASK]) if MASK in pair else None
    return StoredChild(delta, block, header, mask)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the name of the parameter to errors."""
    try:
        yield
    except ValueError as error:  # FormatError is one
        raise FormatError(f"The child of '{name}' cannot be loaded. {error}") from error


def check_numel(name: str, child: StoredChild, base: Tensor) -> None:
    """Raise a `FormatError` if a child network was made for a tensor of another size than its parameter's."""
    if child.header.numel != numel_of(base):
        raise FormatError(
            f"The child of '{name}' cannot be loaded. It was made for a tensor of {child.header.numel} entries, and "
            f"that of the base model has {numel_of(base)}."
        )


def precise_dtype(delta: Tensor) -> torch.dtype:
    """The dtype in memory of a stored delta: float64 for float64, which extraction may need, and float32 otherwise."""
    return torch.float64 if delta.dtype == torch.float64 else torch.float32
