"""Exchanges between ranks: in step, with errors, and without torch.distributed."""

import re

import pytest
import torch
from torch import distributed

from peft_child.tensors.distributed import (
    add_over_ranks,
    check_equal,
    digest,
    gathered,
    in_step,
    on_every_rank,
    rank,
    world_size,
)

from ..ranks import on_two_ranks


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fail(error):
    raise error


def exchange(folder):
    """Rank 0 has three items, rank 1 has one."""
    mine = distributed.get_rank()
    items = ["a", "b", "c"] if mine == 0 else ["x"]
    taken = on_every_rank(lambda: list(in_step(items, lambda rank: False, shared=False)))
    shared = on_every_rank(lambda: list(in_step(items, lambda rank: False, shared=True)))
    tensor = torch.full((2,), float(mine + 1))
    add_over_ranks(tensor)
    errors = [
        error_of(lambda: on_every_rank(lambda: fail(ValueError("wrong")) if mine else 3)),
        error_of(lambda: on_every_rank(lambda: fail(KeyError("gone")))),
        error_of(lambda: check_equal({"seed": mine, "density": 0.1})),
    ]
    return rank(), world_size(), gathered(mine), taken, shared, tensor.tolist(), errors


@pytest.mark.slow  # two processes
def test_two_ranks(tmp_path):
    for number, found in enumerate(on_two_ranks(exchange, tmp_path)):
        own, size, values, taken, shared, total, errors = found
        assert (own, size, values, total) == (number, 2, [0, 1], [3.0, 3.0])
        assert taken == [(number, item) for item in ("abc" if number == 0 else "x")]
        assert shared == [(0, "a"), (1, "x"), (0, "b"), (0, "c")]
        assert errors == [
            "ValueError: wrong (rank 1 of 2)",
            "RuntimeError: KeyError: 'gone' (rank 0, 1 of 2)",
            "ValueError: Every process must have the same seed; got 0 on rank 0, 1 on rank 1.",
        ]


def test_one_process_exchanges_nothing():
    assert (rank(), world_size(), gathered("mine")) == (0, 1, ["mine"])
    assert on_every_rank(lambda: 3) == 3
    with pytest.raises(KeyError):  # as it is
        on_every_rank(lambda: fail(KeyError("gone")))
    assert list(in_step("abc", lambda rank: False, shared=True)) == [(0, "a"), (0, "b"), (0, "c")]
    check_equal({"seed": 1})


def test_a_rank_that_has_enough_takes_no_more():
    left = [2]

    def items():
        for item in "abcd":
            left[0] -= 1
            yield item

    assert [item for _, item in in_step(items(), lambda rank: left[0] <= 0, shared=False)] == ["a", "b"]


def test_a_digest_tells_names_shapes_dtypes_and_bits_apart():
    tensor = torch.tensor([[0.0, 1.0]])
    others = [{"b": tensor}, {"a": tensor.T}, {"a": tensor.double()}, {"a": -tensor}, {}]
    found = {digest({"a": tensor}), *map(digest, others)}
    assert len(found) == 1 + len(others)
    assert digest({"a": tensor.clone()}) in found
    assert re.fullmatch(r"[0-9a-f]{64}", digest({"a": tensor}))
