"""The Fisher pass on data as people have it: truncated examples, losses over batches, and rows that are no batches."""

import re

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from peft_child import estimate_fisher, select_child_network

from ..helpers import assert_same, config_for
from ..problems import batch_of, build


datasets = pytest.importorskip("datasets")


def fisher(name, batches, **options):
    model = get_peft_model(build(name), config_for(name, **options.pop("config", {})))
    return estimate_fisher(model, batches, progress_bar=False, **options)


def without_labels(batch, *rows):
    labels = batch["labels"].clone()
    labels[list(rows)] = -100
    return {**batch, "labels": labels}


def rows_of(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def test_an_example_without_labels_is_skipped_and_counted():
    batch = batch_of("llama")
    model = get_peft_model(build("llama"), config_for("llama"))
    with pytest.warns(UserWarning, match="2 examples have no label but -100; the Fisher information is that of the 2"):
        found = select_child_network(model, [without_labels(batch, 0, 2)], progress_bar=False)
    assert found.skipped == 2
    assert "2 examples without labels were left out" in str(found)
    assert model.peft_config["default"].fisher_examples == 2


def test_the_scores_are_those_of_the_other_examples():
    batch = batch_of("llama")
    expected = fisher("llama", [rows_of(batch, [1, 3])])
    with pytest.warns(UserWarning, match="2 examples"):
        found = fisher("llama", [without_labels(batch, 0, 2)])
    assert_same(found, expected)
    with pytest.warns(UserWarning, match="2 examples"):
        found = fisher("llama", [rows_of(without_labels(batch, 0, 2), [row]) for row in range(4)])
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


@pytest.mark.parametrize("options", [{"config": {"fisher": "authors"}}, {"split_batches": False}])
def test_a_batch_without_labels_is_skipped_as_a_whole(options):
    batch = batch_of("llama")
    expected = fisher("llama", [batch], **options)
    with pytest.warns(UserWarning, match="have no label"):
        assert_same(fisher("llama", [without_labels(batch, 0, 1, 2, 3), batch], **options), expected)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="needs an example with a label other than -100"):
        fisher("llama", [without_labels(batch_of("llama"), 0, 1, 2, 3)])


def in_batch_negatives(output, batch):
    """Every example against all others of the batch, as contrastive losses compare them; alone it costs nothing."""
    vectors = F.normalize(output.logits.flatten(1), dim=-1)
    return F.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors)))


def test_a_loss_over_the_batch_names_the_way_out():
    model = get_peft_model(build("linear"), config_for("linear"))
    with pytest.raises(ValueError, match=r"in-batch negatives.*split_batches=False"):
        select_child_network(model, [batch_of("linear")], loss_fn=in_batch_negatives, progress_bar=False)
    found = select_child_network(
        model, [batch_of("linear")], loss_fn=in_batch_negatives, split_batches=False, progress_bar=False
    )
    assert found.chosen


ROWS = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}] * 4


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (ROWS, "{input_ids: list, attention_mask: list, labels: int}"),
        (datasets.Dataset.from_list(ROWS), "{input_ids: list, attention_mask: list, labels: int}"),
        (datasets.Dataset.from_list(ROWS).with_format("torch"), "{input_ids: (3,), attention_mask: (3,), labels: ()}"),
        (batch_of("bert"), "a str"),
        ("glue/mrpc", "a str"),
    ],
    ids=["rows", "dataset", "torch rows", "one batch", "name"],
)
def test_what_is_no_dataloader_names_the_line_that_makes_one(data, got):
    line = r"DataLoader\(rows, batch_size=8, collate_fn=data_collator\)"
    with pytest.raises(ValueError, match=rf"got {re.escape(got)}\. .*{line}"):
        fisher("bert", data)


def test_half_precision_warns_once():
    model = get_peft_model(build("linear").half(), config_for("linear"))
    batch = {**batch_of("linear"), "x": batch_of("linear")["x"].half()}
    with pytest.warns(UserWarning, match="float16 weights below 6e-8") as caught:
        estimate_fisher(model, [batch, batch], progress_bar=False)
    assert len(caught) == 1
