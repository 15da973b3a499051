"""How large deltas are, against counting them one by one."""

import itertools
import weakref
from collections import Counter

import pytest
import torch

from peft_child.card import delta_counts
from peft_child.card.delta_counts import EDGES, FIRST, STEPS, count_deltas
from peft_child.tensors.delta import SparseDelta
from peft_child.tensors.lazy import Lazy


def delta(values):
    return SparseDelta((len(values), 1), torch.arange(len(values)), values)


def bin_of(size):
    """The last bin that does not start above a size."""
    return max(number for number, edge in enumerate(EDGES) if edge <= size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_deltas_are_counted_by_size_and_sign(monkeypatch, dtype):
    monkeypatch.setattr(delta_counts, "_COUNTED_TOGETHER", 7)
    limits = torch.finfo(dtype)
    odd = [0.0, -0.0, limits.max, -limits.max, limits.tiny, -limits.smallest_normal / 2, 1.0, -0.001, 10**-0.3]
    values = torch.cat([torch.tensor(odd, dtype=torch.float64), torch.randn(50).double() * 1e-3]).to(dtype)
    parts = {"first": values[:20], "second": values[20:21], "third": values[21:]}
    found = count_deltas({name: delta(part) for name, part in parts.items()})
    below = Counter(bin_of(-value) for value in values.tolist() if value < 0)
    above = Counter(bin_of(value) for value in values.tolist() if value > 0)
    assert (found.decreases, found.increases, found.zeros) == (below, above, 2)
    for name, part in parts.items():
        assert found.sums[name] == pytest.approx(sum(abs(value) for value in part.tolist()), rel=1e-12)


def test_the_bins_hold_every_size():
    assert EDGES[0] == 0
    assert all(low <= high for low, high in itertools.pairwise(EDGES))
    assert EDGES[-3 * STEPS - FIRST] == 0.001
    assert bin_of(torch.finfo(torch.float64).max) == len(EDGES) - 1


def test_one_tensor_is_held_at_a_time():
    read = []

    def compute(name):
        assert all(tensor() is None for tensor in read)
        found = delta(torch.ones(5))
        read.extend([weakref.ref(found.values), weakref.ref(found.indices)])
        return found

    assert count_deltas(Lazy("abc", compute)).sums == {"a": 5, "b": 5, "c": 5}
    assert len(read) == 6


def test_deltas_that_are_zero_are_in_no_bin():
    found = count_deltas({"w": delta(torch.zeros(4))})
    assert found == ({"w": 0}, {}, {}, 4)
    assert count_deltas({}) == ({}, {}, {}, 0)
