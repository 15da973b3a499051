"""Choosing whole input channels: scores are the sums of those of their entries, and whole channels are kept."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_child import ChildTuningConfig, estimate_fisher, keep_largest, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.channels import choose_channels
from peft_child.tensors.codec import CHANNELS, read_header

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move
from ..problems import PROBLEMS, Regression, batch_of, build
from .test_batch_scorer import LENGTHS, assert_close, forward_passes, padded, passes_at_once, singles


def by_channels(name, **changes):
    return get_peft_model(build(name), config_for(name, granularity="input_channel", density=0.5, **changes))


def layouts_of(model):
    layers = child_tuning_layers(model).values()
    return {name: layout for layer in layers for name, layout in layer.layouts("default").items()}


@pytest.mark.parametrize("fisher", ["per_example", "authors"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_scores_of_channels_are_the_sums_of_those_of_their_entries(name, fisher):
    batches = [batch_of(name, seed) for seed in range(2)]
    entries = get_peft_model(build(name), config_for(name, fisher=fisher, task_type=None))
    model = by_channels(name, fisher=fisher, task_type=None)
    torch.manual_seed(0)
    single = estimate_fisher(entries, batches, progress_bar=False)
    torch.manual_seed(0)
    found = estimate_fisher(model, batches, progress_bar=False)
    layouts = layouts_of(model)
    assert_close(found, {key: layouts[key].sums(score) for key, score in single.items()})
    select_child_network(model, scores=found)
    size = round(0.5 * sum(layout.numel for layout in layouts.values()))
    chosen = choose_channels(found, layouts, size)
    expected = {key: layouts[key].positions(numbers) for key, numbers in chosen.items() if len(numbers)}
    assert_same(child_of(model), expected)


@pytest.mark.parametrize("labels", ["lm", "class"])
def test_whole_batches_are_scored_at_once(labels):
    name = "llama" if labels == "lm" else "bert"
    model, batches = by_channels(name, task_type=None), list(padded(LENGTHS, labels))
    expected = estimate_fisher(model, singles(batches), progress_bar=False)
    with forward_passes(model) as calls:
        found = estimate_fisher(model, batches, progress_bar=False)
    assert_close(found, expected)
    assert len(calls) == passes_at_once(batches)


def test_a_batch_at_once_computes_no_gradient_of_a_weight(monkeypatch):
    """The part of a score that is computed is as small as the tokens are few."""
    model, batches = by_channels("bert", task_type=None), list(padded([3] * 9, "class"))
    sizes = []
    zeros = torch.zeros

    def count(*shape, **options):
        found = zeros(*shape, **options)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch, "zeros", count)
    estimate_fisher(model, batches, progress_bar=False)
    assert max(sizes) <= max(layout.number for layout in layouts_of(model).values())


@pytest.mark.parametrize("own", ["entry", "input_channel"])
def test_scores_of_the_other_granularity_are_refused(own):
    other = {"entry": "input_channel", "input_channel": "entry"}[own]
    make = {kind: get_peft_model(build("llama"), config_for("llama", granularity=kind)) for kind in (own, other)}
    scores = estimate_fisher(make[other], [batch_of("llama")], progress_bar=False)
    kind = "have the shapes of their parameters" if own == "entry" else "be one for each input channel"
    with pytest.raises(ValueError, match=rf"Scores must {kind}; those of 'model.layers.0.self_attn.q_proj.weight'"):
        select_child_network(make[own], scores=scores)
    assert not child_of(make[own])


@pytest.mark.parametrize("variant", ["task_driven", "random"])
def test_a_density_below_one_channel_names_the_smallest_that_works(variant):
    def choose(density):
        config = config_for("llama", granularity="input_channel", density=density, variant=variant)
        model = get_peft_model(build("llama"), config)
        if variant == "task_driven":
            select_child_network(model, [batch_of("llama")], progress_bar=False)
        return model

    with pytest.raises(
        ValueError, match=r"too small for one input channel.* smallest density that works is 0\.\d+"
    ) as e:
        choose(0.001)
    assert child_of(choose(float(str(e.value).split()[-1].rstrip("."))))


def test_a_granularity_that_there_is_not():
    with pytest.raises(ValueError, match="granularity must be one of 'entry', 'input_channel', got 'row'"):
        ChildTuningConfig(granularity="row")


def are_channels(model, adapter_name="default"):
    """Whether the child network is written as lists of channels."""
    buffers = [buffer for name, buffer in model.named_buffers() if f".child_index.{adapter_name}." in name]
    return {read_header(buffer.numpy().data).encoding for buffer in buffers} == {CHANNELS}


def test_keeping_the_largest_changes_keeps_whole_channels():
    model = chosen_model("bert", granularity="input_channel", density=0.5, task_type=None)
    move(model)
    layouts = layouts_of(model)
    deltas = {
        name: d for layer in child_tuning_layers(model).values() for name, d in layer.sparse_deltas("default").items()
    }
    means = {}
    for name, delta in deltas.items():
        channel, values = layouts[name].channel_of(delta.indices), delta.values.detach()
        means |= {(name, int(n)): float(values[channel == n].square().mean()) for n in channel.unique()}
    kept = keep_largest(model, 0.2)
    total = sum(layout.numel for layout in layouts.values())
    assert kept.chosen == sum(map(len, child_of(model).values())) <= round(0.2 * total)
    assert are_channels(model)
    chosen = {
        (name, int(number)) for name, indices in child_of(model).items() for number in layouts[name].holding(indices)
    }
    assert min(means[key] for key in chosen) >= max(means[key] for key in means.keys() - chosen)


def test_keeping_the_largest_changes_of_a_task_free_adapter_keeps_whole_channels():
    model = chosen_model("llama", granularity="input_channel", variant="task_free", density=0.3)
    assert not are_channels(model)  # all entries
    move(model)
    kept = keep_largest(model, 0.2)
    assert are_channels(model)
    layouts = layouts_of(model)
    for name, indices in child_of(model).items():
        layouts[name].holding(indices)  # an error if a channel is cut
    assert kept.chosen <= round(0.2 * sum(layout.numel for layout in layouts.values()))


def test_combining_unites_channels_and_never_cuts_them():
    model = chosen_model("llama", granularity="input_channel", density=0.3, variant="random")
    model.add_adapter("other", config_for("llama", granularity="input_channel", density=0.3, variant="random", seed=1))
    move(model)
    move(model, adapter_name="other")
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="ties")
    assert are_channels(model, "both")
    for name, indices in child_of(model, "both").items():
        parts = [
            child_of(model, adapter).get(name, torch.empty(0, dtype=torch.int64)) for adapter in ("default", "other")
        ]
        assert torch.equal(indices, torch.cat(parts).unique())
    with pytest.raises(ValueError, match=r"density of 0.5 would cut the input channels"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "cut", combination_type="ties", density=0.5)
    assert "cut" not in model.peft_config


def test_adapters_of_both_granularities_work_in_one_model():
    model = chosen_model("bert", granularity="input_channel", density=0.4, variant="random", task_type=None)
    model.add_adapter("entries", config_for("bert", variant="random", task_type=None))
    move(model)
    move(model, adapter_name="entries")
    model.base_model.set_adapter(["default", "entries"])
    batch = batch_of("bert")
    both = logits(model, batch)
    model.train()(**batch).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".default." in name for name in trained)
    assert any(".entries." in name for name in trained)
    model.merge_adapter()
    assert torch.equal(logits(model, batch), both)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), both)


@pytest.mark.parametrize(("wide", "narrow"), [(6, 1), (1, 6), (1, 1), (6, 3)])
@pytest.mark.parametrize("kind", [nn.Linear, lambda wide, narrow: Conv1D(narrow, wide)])
def test_scores_of_layers_of_one_input_or_output(kind, wide, narrow):
    def scores(granularity):
        torch.manual_seed(0)
        base = Regression(nn.Sequential(kind(wide, narrow)))
        config = ChildTuningConfig(density=1.0, target_parameters=["body.0.weight"], granularity=granularity)
        model = get_peft_model(base, config)
        return layouts_of(model), estimate_fisher(model, batches, progress_bar=False)

    batches = [{"x": torch.randn(5, 4, wide), "labels": torch.randn(5, 4, narrow)} for _ in range(2)]
    layouts, found = scores("input_channel")
    assert_close(found, {name: layouts[name].sums(score) for name, score in scores("entry")[1].items()})


def test_all_channels_of_an_adapter_can_be_kept_at_its_own_density():
    model = chosen_model("conv2d", granularity="input_channel", density=0.5, variant="random")
    move(model)
    before = child_of(model)
    with pytest.raises(ValueError, match="density must be at most that of the adapter"):
        keep_largest(model, 0.6)
    keep_largest(model, 0.5)
    assert_same(child_of(model), before)
