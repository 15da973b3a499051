"""Damage a valid adapter in many ways, and count what the reader makes of it.

    python -m tests.hostile --mutations 20000

Every mutation must either read as the very same adapter or raise FormatError. Anything else is printed, and makes the
script fail. Who forges a block with right checksums may write another valid adapter, which no reader without a
signature can tell; these are counted as "another".
"""

import argparse
import collections
import random
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from peft_child import FormatError
from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.codec import Header, _sealed
from peft_child.tensors.delta import SparseDelta


MOST_MEMORY = 32 << 20  # bytes; the adapter has some kilobytes


def valid_adapter():
    """One child in each encoding."""
    shapes = {"a.sparse.weight": (40, 500, 0.01), "a.dense.weight": (30, 40, 0.3), "a.dense.bias": (9, 1, 0.5)}
    deltas = {}
    for name, (rows, columns, density) in shapes.items():
        indices = (torch.rand(rows * columns) < density).nonzero().flatten()
        deltas[name] = SparseDelta((rows, columns), indices, torch.randn(len(indices)), 7)
    layout = ChannelLayout(1, 30, 40, 1)
    indices = layout.positions(torch.arange(0, 40, 9))
    deltas["a.channels.weight"] = SparseDelta((30, 40), indices, torch.randn(len(indices)), 7, layout)
    return SparseAdapter({"peft_type": "PEFT_CHILD"}, deltas)


def flip(data, rng):
    """Change one byte."""
    at = rng.randrange(len(data))
    data[at] ^= rng.randrange(1, 256)
    return data


def cut(data, rng):
    """Lose the end."""
    return data[: rng.randrange(len(data))]


def extend(data, rng):
    """Add bytes at the end."""
    return data + rng.randbytes(rng.randrange(1, 50))


def scramble(data, rng):
    """Change some bytes in a row."""
    at = rng.randrange(len(data))
    length = rng.randrange(1, 40)
    data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    return data


def swap(tensors, rng):
    """Exchange two tensors."""
    first, second = rng.sample(sorted(tensors), 2)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def drop(tensors, rng):
    """Lose a tensor."""
    del tensors[rng.choice(sorted(tensors))]


def forge(tensors, rng):
    """A block with right checksums that lies in one field, or whose payload is a bomb."""
    key = rng.choice([key for key in sorted(tensors) if "child_index" in key])
    block = tensors[key].numpy().tobytes()
    fields = list(np.frombuffer(block[5:7], np.uint8)) + list(np.frombuffer(block[8:32], "<u8")) + [0, 0]
    fields = [int(field) for field in fields]
    field = rng.randrange(5)
    fields[field] = rng.choice(
        [0, 1, 2, 3, 4, fields[field] + 1, max(0, fields[field] - 1), 1 << 60, 2**64 - 1, 255]
    ) % (256 if field < 2 else 1 << 64)
    payload = block[44:]
    if rng.random() < 0.3:
        payload = zlib.compress(rng.choice([bytes(50_000_000), b"", rng.randbytes(100)]), 1)
    data = _sealed(Header(*fields), payload)
    tensors[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def poison(tensors, rng):
    """A delta that is not finite, with a block that knows no checksum."""
    key = rng.choice([key for key in sorted(tensors) if "child_delta" in key])
    tensors[key] = tensors[key].clone()
    tensors[key][rng.randrange(len(tensors[key]))] = rng.choice([float("nan"), float("inf"), -float("inf")])


OF_BYTES = [flip, flip, flip, cut, extend, scramble]
OF_TENSORS = [swap, drop, forge, forge, forge, poison]


def same(first, second):
    """Whether two sets of deltas are equal in every bit that matters."""
    return first.keys() == second.keys() and all(
        torch.equal(delta.indices, second[name].indices) and torch.equal(delta.values, second[name].values)
        for name, delta in first.items()
    )


def attack(folder, original, rng):
    """Damage a copy of the adapter; says how, and what the reader made of it."""
    weights = folder / "adapter_model.safetensors"
    mutate = rng.choice(OF_BYTES + OF_TENSORS)
    weights.write_bytes(original.bytes)
    if mutate in OF_BYTES:
        weights.write_bytes(mutate(bytearray(original.bytes), rng))
    else:
        tensors = load_file(weights)
        mutate(tensors, rng)
        save_file(tensors, weights, metadata={"format": "pt"})
    tracemalloc.reset_peak()
    try:
        read = read_adapter(folder)
    except FormatError:
        result = "refused"
    except Exception as error:  # that is what is looked for
        result = f"{type(error).__name__}: {error}"
    else:
        other = "another" if mutate is forge else "DIFFERENT"
        result = "the same" if same(read.deltas, original.deltas) else other
    if tracemalloc.get_traced_memory()[1] > MOST_MEMORY:
        result += ", TOO MUCH MEMORY"
    return mutate.__name__, result


Original = collections.namedtuple("Original", ["deltas", "bytes"])


def run(mutations, seed, progress=True):
    """Counts of results by kind of mutation."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter(folder, valid_adapter())
        deltas = dict(read_adapter(folder).deltas)  # now: they are read from the file, which is damaged later
        original = Original(deltas, (folder / "adapter_model.safetensors").read_bytes())
        tracemalloc.start()
        for _ in tqdm(range(mutations), disable=not progress):
            counts[attack(folder, original, rng)] += 1
        tracemalloc.stop()
    return counts


def main():
    """Print the counts; fail if anything was silently different or not a FormatError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = run(args.mutations, args.seed)
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:10} {result:40} {count:7,}")
    if any(result not in ("refused", "the same", "another") for _, result in counts):
        raise SystemExit("The reader let something through.")


if __name__ == "__main__":
    main()
