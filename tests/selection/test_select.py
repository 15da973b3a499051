import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_child import estimate_fisher, select_child_network, weight_magnitudes
from peft_child.layers.layer import child_tuning_layers

from .. import reference
from ..helpers import assert_same, child_of, config_for, logits, move, snapshot, train
from ..problems import PROBLEMS, batch_of, bert_batch, build


def unchosen(name, base=None, **changes):
    return get_peft_model(build(name) if base is None else base, config_for(name, **changes))


def scored(model, batches, **options):
    return estimate_fisher(model, batches, progress_bar=False, **options)


def chosen(model, batches, **options):
    select_child_network(model, batches, progress_bar=False, **options)
    return child_of(model)


def examples_of(batch):
    """Single examples of a batch of tensors."""
    size = len(next(iter(batch.values())))
    return [{key: value[index : index + 1] for key, value in batch.items()} for index in range(size)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_child_network_equals_the_definition(name):
    plain = build(name)
    model = unchosen(name, task_type=None)
    names = [
        target for layer in child_tuning_layers(model).values() for target in layer.targets_of("default").values()
    ]
    batch = batch_of(name)
    expected = reference.fisher(plain, examples_of(batch), names)
    scores = scored(model, [batch])
    assert scores.keys() == expected.keys()
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-4, atol=1e-12)
    # From the very same scores, the choice is exact.
    total = sum(score.numel() for score in scores.values())
    wanted = reference.largest(scores, round(0.3 * total))
    child = chosen(model, [batch])
    assert all(torch.equal(child.get(key, torch.empty(0, dtype=torch.int64)), wanted[key]) for key in scores)
    # And from the definition's own scores, up to near ties.
    by_definition = reference.largest(expected, round(0.3 * total))
    shared = sum(int(torch.isin(wanted[key], by_definition[key]).sum()) for key in scores)
    assert shared >= 0.99 * round(0.3 * total)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_largest_weights_equal_the_definition(name):
    plain, model = dict(build(name).named_parameters()), unchosen(name, task_type=None)
    scores = weight_magnitudes(model)
    expected = {key: plain[key].detach().float().abs() for key in scores}
    assert_same(scores, expected)
    wanted = reference.largest(expected, round(0.3 * sum(score.numel() for score in expected.values())))
    select_child_network(model, scores=scores)
    assert_same(child_of(model), {key: positions for key, positions in wanted.items() if len(positions)})


def test_the_channels_with_the_largest_weights_equal_the_definition():
    model = unchosen(
        "llama", granularity="input_channel", target_modules=["q_proj", "down_proj"], target_parameters=None
    )
    for name, score in weight_magnitudes(model).items():
        weight = build("llama").get_parameter(name)
        expected = torch.stack([weight.detach()[:, channel].square().sum() for channel in range(weight.shape[1])])
        torch.testing.assert_close(score, expected)


def test_magnitudes_of_half_precision_are_those_of_its_values():
    base = build("llama").bfloat16()
    scores = weight_magnitudes(unchosen("llama", base))
    assert all(score.dtype == torch.float32 for score in scores.values())
    assert_same(scores, {name: base.get_parameter(name).detach().float().abs() for name in scores})


def test_a_refused_choice_keeps_the_record_of_the_last_one():
    model = unchosen("linear")
    chosen(model, [batch_of("linear")])
    with pytest.raises(ValueError, match="exactly one tensor"):
        select_child_network(model, scores={})
    assert model.peft_config["default"].fisher_examples == 4


def test_scores_can_be_kept_and_used_again(tmp_path):
    first = unchosen("bert")
    scores = scored(first, [bert_batch()])
    save_file(scores, tmp_path / "fisher.safetensors")
    select_child_network(first, scores=scores)
    second = unchosen("bert")
    select_child_network(second, scores=tmp_path / "fisher.safetensors")
    assert_same(child_of(first), child_of(second))
    assert second.peft_config["default"].fisher_examples is None


def test_exact_count_also_when_nearly_all_scores_are_zero():
    model = unchosen("bert")
    scores = {key: score * (torch.rand(score.shape) > 0.95) for key, score in scored(model, [bert_batch()]).items()}
    result = select_child_network(model, scores=scores)
    total = sum(score.numel() for score in scores.values())
    assert result.chosen == round(0.3 * total) == sum(map(len, child_of(model).values()))
    assert result.targeted == total
    assert result.dense == 2 * 16 + 2
    assert f"{result.chosen:,} of {total:,} targeted entries" in str(result)
    assert "34 other entries are trained densely" in str(result)


def test_scoring_a_second_adapter_ignores_the_first():
    model = unchosen("linear")
    batch = batch_of("linear")
    expected = scored(model, [batch])
    select_child_network(model, scores=expected)
    move(model)
    model.add_adapter("second", config_for("linear"))
    with pytest.raises(ValueError, match=r"'second' is not active \(default is\): pass adapter_name= .*, or"):
        scored(model, [batch], adapter_name="second")
    model.set_adapter("second")
    assert_same(scored(model, [batch], adapter_name="second"), expected)


def test_data_or_scores():
    model = unchosen("linear")
    for arguments in ({}, {"dataloader": [], "scores": {}}):
        with pytest.raises(ValueError, match="either a dataloader or scores, got both or neither"):
            select_child_network(model, **arguments)


def test_choosing_again_after_training_is_refused():
    model = unchosen("linear")
    chosen(model, [batch_of("linear")])
    train(model, [batch_of("linear")])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="adapter 'default' has been trained already"):
        chosen(model, [batch_of("linear")])
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("body.0.bias"), "exactly one tensor for each.*1 are missing: 'body.0.bias'"),
        (lambda s: s.update(other=torch.ones(2)), "exactly one tensor for each.*1 are extra: 'other'"),
        (
            lambda s: s.update({"body.0.bias": torch.ones(3)}),
            r"those of 'body.0.bias' have the shape \(3,\), .*\(8,\)",
        ),
        (lambda s: s["body.0.bias"].fill_(-1), "finite and not negative; those of 'body.0.bias'"),
        (lambda s: s["body.0.bias"].fill_(float("nan")), "finite and not negative; those of 'body.0.bias'"),
        (
            lambda s: s.update({"body.0.bias": torch.ones(8).double()}),
            "must be float32, bfloat16 or float16, those of 'body.0.bias'",
        ),
    ],
)
def test_bad_scores(change, message):
    model = unchosen("linear")
    scores = scored(model, [batch_of("linear")])
    change(scores)
    with pytest.raises(ValueError, match=message):
        select_child_network(model, scores=scores)
    assert not child_of(model)


def test_only_task_driven_adapters_are_selected():
    model = unchosen("linear", variant="random")
    with pytest.raises(ValueError, match="Only a task_driven child network is selected; 'default' is random"):
        chosen(model, [batch_of("linear")])


def test_a_model_without_the_adapter():
    with pytest.raises(ValueError, match="no Child-Tuning adapter named 'default'"):
        chosen(build("linear"), [batch_of("linear")])
    with pytest.raises(ValueError, match="no Child-Tuning adapter named 'other'"):
        chosen(unchosen("linear"), [batch_of("linear")], adapter_name="other")


def test_training_before_the_choice_is_refused_and_inference_is_not(tmp_path):
    model = unchosen("bert").train()
    with pytest.raises(RuntimeError, match="adapter 'default' has not been chosen: call select_child_network"):
        model(**bert_batch())
    with torch.no_grad():
        model(**bert_batch())
    for refused in (model.merge_adapter, model.merge_and_unload, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"has not been chosen.*before (merging|saving)"):
            refused()
    read = unchosen("attention_output").train()
    with pytest.raises(RuntimeError, match="has not been chosen"):
        read(**batch_of("attention"))
    assert torch.equal(logits(model, batch_of("bert")), logits(model.unload(), batch_of("bert")))
