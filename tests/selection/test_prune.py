"""From a dense change to a sparse one."""

import pytest
import torch
from peft import PeftModel

from peft_child import keep_largest
from peft_child.layers.layer import child_tuning_layers

from .. import reference
from ..helpers import assert_same, child_of, chosen_model, logits, move, snapshot, train
from ..problems import batch_of, build
from ..tuner.test_task_free import model_of, steps_of


@pytest.mark.parametrize("name", ["linear", "bert"])
def test_keeping_the_largest_changes(tmp_path, name):
    base = build(name)
    weights = {key: value.detach().clone() for key, value in base.state_dict().items()}
    model = model_of(name, base, task_type=None)
    train(model, [batch_of(name, seed) for seed in range(4)])
    dense = {
        target: layer.named_deltas("default")[target].clone()
        for layer in child_tuning_layers(model).values()
        for key, target in layer.targets_of("default").items()
    }
    kept = keep_largest(model, 0.1)
    expected = reference.largest({target: value.abs() for target, value in dense.items()}, kept.chosen)
    assert kept.chosen == round(0.1 * sum(value.numel() for value in dense.values()))
    assert_same(child_of(model), {target: indices for target, indices in expected.items() if indices.numel()})
    every = torch.cat(list(dense.values()))
    largest, _ = every.abs().sort(descending=True)
    assert kept.largest_dropped == largest[kept.chosen]
    assert kept.norm_share == pytest.approx(float(largest[: kept.chosen].norm() / every.norm()))
    assert "% of the norm" in str(kept)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(loaded, batch_of(name)), logits(model, batch_of(name)))
    merged = model.merge_and_unload().state_dict()
    for key, value in weights.items():
        change = torch.zeros(value.numel())
        if key in dense:
            change[expected[key]] = dense[key][expected[key]]
        assert torch.equal(merged[key], value + change.view(value.shape))


def test_changes_that_are_not_finite_are_refused():
    model = model_of("linear")
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "child_delta" in name)[0] = float("nan")
    with pytest.raises(ValueError, match=r"Changes must be finite; those of 'body.0.weight'"):
        keep_largest(model, 0.1)


def test_what_was_kept_can_be_trained_on():
    model = model_of("linear")
    train(model, [batch_of("linear")])
    keep_largest(model, 0.2)
    child = child_of(model)
    assert not steps_of(model)
    before = snapshot(model)
    train(model, [batch_of("linear")])
    moved = [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]
    assert moved
    assert all("child_delta" in name for name in moved)
    assert_same(child_of(model), child)


@pytest.mark.parametrize(
    ("density", "message"), [(0.5, "at most that of the adapter"), (0, "density must be a number")]
)
def test_keeping_what_is_not_there(density, message):
    model = chosen_model("linear")
    move(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        keep_largest(model, density)
    assert_same(snapshot(model), before)


def test_keeping_the_largest_changes_of_an_untrained_adapter():
    with pytest.raises(ValueError, match="'default' has not been trained"):
        keep_largest(chosen_model("linear"), 0.1)


# Without an adapter
