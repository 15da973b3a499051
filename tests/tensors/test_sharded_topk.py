"""The exact choice from scores in shards is that from whole tensors."""

import pytest
import torch
from torch import distributed

from peft_child.tensors.sharded_topk import select_largest_of_shards
from peft_child.tensors.topk import select_largest

from ..helpers import assert_same
from ..ranks import on_two_ranks


pytestmark = pytest.mark.slow  # two processes

SIZES = [1, 7, 60, 126]


def scores():
    torch.manual_seed(0)
    found = {"even": torch.rand(8, 5), "odd": torch.rand(7, 6), "row": torch.rand(1, 4), "vector": torch.rand(40)}
    return {name: (score * 8).round() / 8 for name, score in found.items()}  # with many ties


def choose(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    shards = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in scores().items()}
    found = [select_largest_of_shards(shards, size) for size in SIZES]
    errors = []
    for wrong in (distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]), torch.ones(4, 4)):
        try:
            select_largest_of_shards({**shards, "wrong": wrong}, 3)
        except ValueError as error:
            errors.append(str(error))
    return found, errors


def test_the_choice_from_shards_is_that_from_whole_tensors(tmp_path):
    (found, errors), (other, _) = on_two_ranks(choose, tmp_path)
    for size, mine, theirs in zip(SIZES, found, other, strict=True):
        assert_same(mine, select_largest(scores(), size))
        assert_same(mine, theirs)
    assert len(errors) == 2
    assert errors[0].startswith("Scores must be sharded in their first dimension over all processes; those of 'wrong'")
    assert errors[1].startswith("Either all scores are sharded or none; those of 'wrong' are not.")
