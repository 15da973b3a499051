"""Batches at once against one example at a time, for every kind of model and loss."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig, estimate_fisher
from peft_child.selection.batches import some_examples

from ..helpers import config_for
from ..problems import PROBLEMS, batch_of, build


@contextmanager
def forward_passes(model):
    """Counts the calls of a model."""
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(None))
    yield calls
    handle.remove()


def size_of(batch):
    return len(next(iter(batch.values())))


def singles(batches):
    return [some_examples(batch, [index], size_of(batch)) for batch in batches for index in range(size_of(batch))]


def reasons(caplog):
    """Why batches were taken apart."""
    return [record.getMessage() for record in caplog.records if record.name == "peft_child.selection.batch_scorer"]


def assert_close(found, expected, tolerance=1e-5, floor=1e-9):
    """Differences are at most 1e-5 of the largest score of the tensor; or nothing beside that of the whole model.

    Some gradients are zero, such as those of the biases of keys in attention, and come as rounding errors.
    """
    assert found.keys() == expected.keys()
    largest = max(score.max() for score in expected.values())
    assert largest > 0
    for name, score in expected.items():
        difference = (found[name] - score).abs().max()
        assert difference <= tolerance * score.max() + floor * largest, name


def check(model, batches, passes, tolerance=1e-5, **options):
    """Scores equal those of single examples, after so many forward passes."""
    expected = estimate_fisher(model, singles(batches), progress_bar=False, **options)
    with forward_passes(model) as calls:
        found = estimate_fisher(model, batches, progress_bar=False, **options)
    assert_close(found, expected, tolerance)
    assert len(calls) == passes
    return found


def passes_at_once(batches, compared=1):
    """Forward passes if nothing speaks against batches at once: two examples of some batches are compared before."""
    return 3 * compared + len(batches)


ONE_BY_ONE = {
    "attention": r"most targeted weights are in modules \(MultiheadAttention\) whose gradients have no formula",
    "attention_output": "the targeted weights are used without calling their modules",
    "experts": r"most targeted weights are in modules \(Experts\) whose gradients have no formula",
    "mixtral": r"most targeted weights are in modules \(MixtralExperts\) whose gradients have no formula",
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_model(name, caplog):
    model = get_peft_model(build(name), config_for(name, task_type=None))
    batches = [batch_of(name, seed) for seed in range(3)]
    if name not in ONE_BY_ONE:
        check(model, batches, passes_at_once(batches))
        assert not reasons(caplog)
        return
    tried = 0 if "most targeted" in ONE_BY_ONE[name] else 1
    check(model, batches, 12 + tried)
    (reason,) = reasons(caplog)
    assert re.search(ONE_BY_ONE[name], reason)


def adapted(base, **targets):
    return get_peft_model(base, ChildTuningConfig(density=0.5, **targets))


class Head(nn.Module):
    """Any body, with the loss that it is given."""

    def __init__(self, body, loss):
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x, labels=None):
        return SimpleNamespace(loss=self.loss(self.body(x), labels))


def floats(*shape, width=3):
    return {"x": torch.randn(shape), "labels": torch.randn(*shape[:-1], width)}


def padded(lengths, labels="lm", size=3, vocabulary=50):
    """Batches of sequences of these lengths, padded; a part of each is a prompt without labels."""
    for start in range(0, len(lengths), size):
        own = lengths[start : start + size]
        ids = torch.randint(2, vocabulary, (len(own), max(own)))
        mask = torch.arange(max(own)) < torch.tensor(own).unsqueeze(1)
        batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
        if labels == "class":
            yield {**batch, "labels": torch.randint(0, 2, (len(own),))}
        else:
            prompt = torch.arange(max(own)) < torch.tensor(own).unsqueeze(1) // 3
            yield {**batch, "labels": ids.masked_fill(~mask | prompt, -100)}


LENGTHS = [9, 4, 7, 5, 9, 12, 3, 6, 6, 8, 8, 8]


def test_tuples_and_lists(caplog):
    model = adapted(nn.Sequential(nn.Linear(6, 3)), target_modules=["0"])
    batches = [(torch.randn(5, 6), [1.0, 2.0, 3.0, 4.0, 5.0]) for _ in range(3)]
    ones = [(x[i : i + 1], factor[i : i + 1]) for x, factor in batches for i in range(5)]

    def forward(model, batch):
        calls.append(None)
        return (model(batch[0]).square().sum(1) * torch.tensor(batch[1])).mean()

    calls = []
    expected = estimate_fisher(model, ones, forward_fn=forward, progress_bar=False)
    calls.clear()
    assert_close(estimate_fisher(model, batches, forward_fn=forward, progress_bar=False), expected)
    assert len(calls) == passes_at_once(batches)
    assert not reasons(caplog)


def test_batch_normalisation_in_training_mode(caplog):
    class Always(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    body = nn.Sequential(nn.Conv1d(2, 4, 3), Always(4, momentum=0.0))
    model = adapted(Head(body, lambda x, labels: x.pow(3).mean()), target_modules=["body.0"])
    check(model, [{"x": torch.randn(4, 2, 9)} for _ in range(2)], 9)
    (reason,) = reasons(caplog)
    assert "examples influence each other" in reason


def test_a_loss_over_the_whole_batch(caplog):
    def balanced(x, labels):
        share = torch.softmax(x, -1).mean((0, 1))
        return F.mse_loss(x, labels) + 0.5 * share.square().sum()

    model = adapted(Head(nn.Linear(6, 3), balanced), target_modules=["body"])
    batches = [floats(5, 4, 6) for _ in range(3)]
    check(model, batches, 15 + 1)
    (reason,) = reasons(caplog)
    assert "examples influence each other" in reason


def test_noise_that_is_always_on(caplog):
    model = adapted(Head(nn.Linear(6, 3), lambda x, labels: F.mse_loss(F.dropout(x), labels)), target_modules=["body"])
    with forward_passes(model) as calls:
        estimate_fisher(model, [floats(5, 6), floats(5, 6)], progress_bar=False)
    assert len(calls) == 11
    assert len(reasons(caplog)) == 1


def test_a_model_for_single_examples(caplog):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            if len(x) > 1:
                raise RuntimeError("one at a time, please")
            return SimpleNamespace(loss=self.linear(x).square().mean())

    batches = [{"x": torch.randn(5, 6)} for _ in range(2)]
    check(adapted(Single(), target_modules=["linear"]), batches, 11)
    assert "RuntimeError: one at a time, please" in reasons(caplog)[0]


def test_modules_that_appear_later_are_compared_as_well(caplog):
    class Late(nn.Module):
        """A layer that is used with some data only."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, labels, extra):
            x = self.first(x)
            x = self.second(x) if extra[0] else x
            return SimpleNamespace(loss=F.mse_loss(x, labels))

    model = adapted(Late(), target_modules=["first", "second"])
    batches = [{**floats(5, 6, width=6), "extra": torch.full((5,), late)} for late in (0, 0, 1, 1)]
    check(model, batches, passes_at_once(batches, compared=2) + 1)  # and the one that noticed
    assert not reasons(caplog)


class WithoutPadding(nn.Module):
    """Computes real tokens only, as encoders without padding do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, ids, mask, labels):
        found = torch.zeros(*ids.shape, 3)
        found[mask] = self.linear(self.embedding(ids[mask]))
        means = (found.sum(1) / mask.sum(1, keepdim=True)).square()
        return SimpleNamespace(loss=F.cross_entropy(means, labels))


def of_lengths(*lengths, width=6):
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return {"ids": torch.randint(20, mask.shape), "mask": mask, "labels": torch.randint(3, mask.shape[:1])}


def test_a_model_that_leaves_padding_out(caplog):
    """The tokens of the later batches can be divided evenly among the examples, but not by example."""
    model = adapted(WithoutPadding(), target_modules=["embedding", "linear"])
    full, even, uneven = of_lengths(6, 6, 6, 6), of_lengths(4, 4, 4, 4), of_lengths(2, 6, 3, 5)
    check(model, [full, full], passes_at_once([full, full]))
    assert not reasons(caplog)
    check(model, [even, uneven, uneven], 13)
    check(model, [full, uneven, uneven], 3 + 1 + 8 + 1)
    assert all("one row, or one row for each token" in reason for reason in reasons(caplog))


def test_examples_that_go_to_different_modules(caplog):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

        def forward(self, x, kind, labels):
            found = torch.zeros(len(x), 4, 3)
            for number, expert in enumerate(self.experts):
                chosen = kind == number
                if chosen.any():
                    found[chosen] = expert(x[chosen].flatten(0, 1)).unflatten(0, (-1, 4))
            return SimpleNamespace(loss=F.mse_loss(found, labels))

    model = adapted(Routed(), target_modules=["experts.0", "experts.1"])
    kinds = [[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0]]
    check(model, [{**floats(4, 4, 6), "kind": torch.tensor(kind)} for kind in kinds], 3 + 1 + 1 + 8)
    assert "one row, or one row for each token" in reasons(caplog)[0]


@pytest.mark.parametrize("number", [1, 2, 4, 7, 8])
def test_num_examples_cuts_batches(number):
    model = get_peft_model(build("bert"), config_for("bert"))
    batches = list(padded([6] * 9, "class"))
    expected = estimate_fisher(model, singles(batches)[:number], progress_bar=False)
    assert_close(estimate_fisher(model, batches, num_examples=number, progress_bar=False), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_precisions(dtype, tolerance, caplog):
    model = get_peft_model(build("llama", dtype=dtype), config_for("llama"))
    batches = list(padded(LENGTHS))
    expected = estimate_fisher(model, singles(batches), progress_bar=False)
    with forward_passes(model) as calls:
        found = estimate_fisher(model, batches, progress_bar=False)
    assert len(calls) <= passes_at_once(batches, compared=2)
    assert not reasons(caplog)
    assert_close(found, expected, tolerance, floor=tolerance**2)
    assert all(score.dtype == torch.float32 for score in found.values())


@pytest.mark.parametrize("wrong", [3, 7])
def test_the_example_that_is_not_finite_is_named(wrong):
    batches = [floats(5, 6) for _ in range(2)]
    batches[wrong // 5]["x"][wrong % 5, 0] = float("inf")
    model = adapted(Head(nn.Linear(6, 3), F.mse_loss), target_modules=["body"])
    with pytest.raises(ValueError, match=f"that of example {wrong} is (nan|inf)"):
        estimate_fisher(model, batches, progress_bar=False)


def test_the_example_without_labels_is_left_out():
    batches = list(padded(LENGTHS))
    batches[2]["labels"][1] = -100
    model = get_peft_model(build("llama"), config_for("llama"))
    with pytest.warns(UserWarning, match=r"1 examples have no label but -100; .* of the 11 others"):
        estimate_fisher(model, batches, progress_bar=False)


def test_parameters_need_gradients_again_afterwards_and_no_hook_stays():
    model = get_peft_model(build("bert"), config_for("bert"))
    before = [parameter.requires_grad for parameter in model.parameters()]
    estimate_fisher(model, list(padded(LENGTHS, "class")), progress_bar=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not any(module._forward_hooks for module in model.modules())
