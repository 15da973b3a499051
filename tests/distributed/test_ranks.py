"""The choice of a child network in several processes."""

import re
import time

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from peft_child import estimate_fisher, select_child_network
from peft_child.tensors.distributed import check_equal, gathered, on_every_rank, rank, world_size

from .. import reference
from ..helpers import assert_same, child_of, config_for
from ..problems import tiny_bert
from ..ranks import on_two_ranks


pytestmark = pytest.mark.slow  # two processes each


def rows(*indices):
    """Some of eight examples for BERT."""
    torch.manual_seed(7)
    columns = {"input_ids": torch.randint(2, 50, (8, 6)), "labels": torch.randint(0, 2, (8,))}
    return {key: column[list(indices)] for key, column in columns.items()}


def bert(**changes):
    torch.manual_seed(0)
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return get_peft_model(base, config_for("bert", **changes))


def found(batches, fisher="per_example", **options):
    """Scores, the child network chosen from the same data, and the recorded number of examples."""
    model = bert(fisher=fisher)
    scores = estimate_fisher(model, batches, progress_bar=False, **options)
    select_child_network(model, batches, progress_bar=False, **options)
    return scores, child_of(model), model.peft_config["default"].fisher_examples


# Three of the eight examples are on rank 0 and five on rank 1, so that a mean of means would not do.
SHARDS = ([rows(0, 1), rows(2)], [rows(3, 4, 5), rows(6, 7)])


def choose(folder):
    mine = SHARDS[distributed.get_rank()]
    data = [{key: column[index] for key, column in rows(*range(8)).items()} for index in range(8)]
    sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=4)
    return {
        "per_example": found(mine),
        "authors": found(mine, fisher="authors"),
        "five": found(mine, num_examples=5),
        "sampler": found(DataLoader(data, batch_size=2, sampler=sampler)),
        "accelerate": found(Accelerator(cpu=True).prepare(loader)),
    }


def test_the_choice_is_that_of_one_process_with_all_examples(tmp_path):
    first, second = on_two_ranks(choose, tmp_path)
    alone = {
        "per_example": found([rows(*range(8))]),
        "authors": found([*SHARDS[0], *SHARDS[1]], fisher="authors"),
        "five": found([rows(0, 1, 2, 3, 4)]),
        "sampler": found([rows(*range(8))]),
        "accelerate": found([rows(*range(8))]),
    }
    for case, (expected, _, examples) in alone.items():
        scores, child, counted = first[case]
        assert_same(scores, second[case][0])
        assert_same(child, second[case][1])
        assert counted == second[case][2] == examples
        for name, score in scores.items():
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-12)
        wanted = reference.largest(scores, sum(map(len, child.values())))
        assert_same(child, {name: indices for name, indices in wanted.items() if len(indices)})


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def raised(call):
    """The exception of a call, as seen here."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def select(batches=None, options=None, **changes):
    model = bert(**changes)
    error = raised(lambda: select_child_network(model, batches, progress_bar=False, **(options or {})))
    assert not child_of(model)
    return error


def broken(*indices):
    """Examples of which the last cannot be scored."""
    batch = rows(*indices)
    return [{**batch, "input_ids": batch["input_ids"].index_fill(0, torch.tensor([len(indices) - 1]), 99)}]


def stop_early():
    """How many examples this rank scores before it knows that the other one has failed in its second batch."""
    seen = []

    def forward(model, batch):
        seen.append(batch)
        if distributed.get_rank() == 1 and len(seen) >= 3:
            raise KeyError("the third example")
        return model(**batch)

    error = select([rows(0, 1)] * 50, {"forward_fn": forward})
    return error, len(seen)


def dispatched():
    """A dataloader that communicates: rank 0 reads the data and sends the others their part of each batch."""
    data = [{key: column[index] for key, column in rows(*range(8)).items()} for index in range(8)]
    return Accelerator(cpu=True).prepare(DataLoader(Stream(data), batch_size=2))


def fail_in_step(folder):
    def forward(model, batch):
        if distributed.get_rank() == 1:
            raise KeyError("any example")
        return model(**batch)

    return {
        "early": stop_early(),
        "dispatched": select(dispatched(), {"forward_fn": forward}),
        "after it": found(dispatched()),
        "five": found(dispatched(), num_examples=5),
    }


def test_ranks_keep_step_while_they_score(tmp_path):
    first, second = on_two_ranks(fail_in_step, tmp_path)
    for error, examples in (first["early"], second["early"]):
        assert error == ("RuntimeError", "KeyError: 'the third example' (rank 1 of 2)")
        assert examples <= 4  # of a hundred
    assert first["dispatched"] == second["dispatched"] == ("RuntimeError", "KeyError: 'any example' (rank 1 of 2)")
    alone = {"after it": found([rows(*range(8))]), "five": found([rows(0, 1, 2, 3, 4)])}
    for case, (expected, _, examples) in alone.items():
        scores, child, counted = first[case]
        assert counted == examples
        assert_same(child, second[case][1])
        for name, score in scores.items():
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-12)


def other_head():
    model = bert()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(distributed.get_rank())
    return raised(lambda: estimate_fisher(model, [rows(0)], progress_bar=False))


def through_nccl(data):
    backend, distributed.get_backend = distributed.get_backend, lambda: "nccl"
    try:
        return select(data)
    finally:
        distributed.get_backend = backend


def fail(folder):
    here = distributed.get_rank()
    data, last = [rows(0, 1)], here == 1
    shapes = {name: score.shape for name, score in found(data)[0].items()}
    torch.manual_seed(here)
    noise = {name: torch.rand(shape) for name, shape in shapes.items()}
    without = {name: score for name, score in noise.items() if not (last and name.endswith("query.bias"))}
    started = time.monotonic()
    errors = {
        "no data": select([] if last else data),
        "failing example": select(broken(3, 4) if last else data),
        "failing everywhere": select(broken(3, 4)),
        "strange batch": select(["text"] if last else data),
        "density": select(data, density=0.2 if last else 0.3),
        "fisher": select(data, fisher="authors" if last else "per_example"),
        "targets": select(data, target_modules=["query"] if last else ["key"]),
        "more targets": select(data, target_modules=["query", "key"] if last else ["key"]),
        "variant": raised(
            lambda: select_child_network(
                bert(variant="random" if last else "task_driven"), data, progress_bar=False
            )
        ),
        "num_examples": select(data, {"num_examples": 3 if last else None}),
        "too few": select(data, {"num_examples": 1}),
        "source": select(None if last else data, {"scores": noise} if last else None),
        "neither": select(None if last else data),
        "scores": select(None, {"scores": noise}),
        "missing score": select(None, {"scores": without}),
        "head": other_head(),
        "nccl": through_nccl(data),
    }  # fmt: skip
    errors["seconds"] = time.monotonic() - started
    found(data)  # what failed leaves the ranks in step
    return errors


MESSAGES = {
    "no data": r"at least one example, got none. \(rank 1 of 2\)",
    "failing example": r"^IndexError: index out of range in self \(rank 1 of 2\)",
    "failing everywhere": r"^IndexError: index out of range in self \(rank 0, 1 of 2\)",
    "strange batch": r"a row for each example, got a str\. .*collate_fn=data_collator.* \(rank 1 of 2\)",
    "density": "Every process must have the same density; got 0.3 on rank 0, 0.2 on rank 1.",
    "fisher": "Every process must have the same fisher; got 'per_example' on rank 0, 'authors' on rank 1.",
    "targets": r"the same digest of the targeted parameters' names and shapes; got '\w{12}' on rank 0, ",
    "more targets": "the same number of targeted parameters; got 4 on rank 0, 8 on rank 1.",
    "variant": r"Only a task_driven child network is selected; 'default' is random. \(rank 1 of 2\)",
    "num_examples": "Every process must have the same num_examples; got None on rank 0, 3 on rank 1.",
    "too few": "num_examples must be None or at least the number of processes, 2; got 1.",
    "source": "Every process must have the same source; got 'data' on rank 0, 'ready scores' on rank 1.",
    "neither": r"needs either a dataloader or scores, got both or neither. \(rank 1 of 2\)",
    "scores": "Every process must have the same scores; these would choose different child networks.",
    "missing score": r"exactly one tensor for each.*2 are missing: .*query.bias'.* \(rank 1 of 2\)",
    "nccl": "backend is nccl, which takes tensors on GPUs only: move the model to its GPU before",
    "head": "the same digest of the densely trained weights .set the same seed before a new head is made.; got ",
}


def test_an_error_on_one_rank_is_raised_on_every_rank_at_once(tmp_path):
    first, second = on_two_ranks(fail, tmp_path)
    assert max(first.pop("seconds"), second.pop("seconds")) < 15
    assert first == second
    assert first.keys() == MESSAGES.keys()
    for case, message in MESSAGES.items():
        kind, text = first[case]
        assert kind == ("RuntimeError" if "failing" in case else "ValueError")
        assert re.search(message, text), f"{case}: {text}"


def test_one_process_exchanges_nothing():
    assert world_size() == 1
    assert rank() == 0
    assert gathered("value") == ["value"]
    check_equal({"a": 1})
    with pytest.raises(KeyError):  # as it is
        on_every_rank(lambda: {}["missing"])
