import random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_child import ChildTuningConfig, estimate_fisher, select_child_network
from peft_child.tuner.layer import child_tuning_layers

from .. import reference
from ..helpers import assert_same, child_of, config_for, logits, move, snapshot, train
from ..problems import PROBLEMS, batch_of, bert_batch, build, tiny_bert


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


def test_batch_size_order_and_padding_do_not_matter():
    torch.manual_seed(1)
    ids, labels = torch.randint(2, 50, (12, 6)), torch.randint(0, 2, (12,))

    def batches(size, order, padding=0):
        for index in torch.as_tensor(order).split(size):
            mask = torch.ones(len(index), 6, dtype=torch.int64)
            pad = torch.zeros(len(index), padding, dtype=torch.int64)
            yield {
                "input_ids": torch.cat([ids[index], pad], 1),
                "attention_mask": torch.cat([mask, pad], 1),
                "labels": labels[index],
            }

    model = unchosen("bert")
    forwards, backwards = list(range(12)), list(range(11, -1, -1))
    expected = scored(model, batches(1, forwards))
    for found in (
        scored(model, batches(5, forwards)),
        scored(model, batches(12, backwards)),
        scored(model, batches(4, forwards, padding=3)),
    ):
        for key, score in found.items():
            torch.testing.assert_close(score, expected[key], rtol=2e-4, atol=1e-12)


def test_num_examples_takes_the_first_ones():
    model = unchosen("bert")
    batch = bert_batch()
    expected = scored(model, examples_of(batch)[:3])
    assert_same(scored(model, [batch, batch], num_examples=3), expected)
    chosen(model, [batch], num_examples=3)
    assert model.peft_config["default"].fisher_examples == 3
    with pytest.raises(ValueError, match="num_examples must be None or at least the number of processes, 1; got 0"):
        scored(model, [batch], num_examples=0)


def test_the_authors_way_squares_clipped_batch_gradients_with_dropout():
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = {key: value.detach().clone().requires_grad_() for key, value in base.named_parameters()}
    model = get_peft_model(base, config_for("bert", fisher="authors"))
    batches = [bert_batch() for _ in range(3)]
    expected = {key: torch.zeros_like(value) for key, value in plain.items()}
    for batch in batches:
        loss = torch.func.functional_call(build("bert"), plain, kwargs=batch).loss
        gradients = torch.autograd.grad(loss, list(plain.values()), allow_unused=True)
        for key, gradient in zip(plain, gradients, strict=True):
            if gradient is not None:
                clipped = gradient * min(1.0, 1.0 / (gradient.norm().item() + 1e-6))
                expected[key] += clipped.square() / 3
    scores = scored(model, batches)
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-3, atol=1e-10)

    dropping = get_peft_model(build("bert"), config_for("bert", fisher="authors"))
    assert any(not torch.equal(score, scores[key]) for key, score in scored(dropping, batches).items())


def test_the_model_comes_back_as_it_was():
    model = unchosen("bert")
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    head = next(parameter for key, parameter in model.named_parameters() if "modules_to_save" in key)
    head.grad = torch.ones_like(head)
    frozen = model.base_model.model.bert.embeddings.word_embeddings.weight
    frozen.grad = torch.ones_like(frozen)

    def state():
        return (
            [module.training for module in model.modules()],
            [(parameter.requires_grad, id(parameter.grad)) for parameter in model.parameters()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002
        )

    before, weights = state(), snapshot(model)
    loader = DataLoader(
        [{"input_ids": ids, "labels": torch.tensor(0)} for ids in torch.randint(2, 50, (6, 6))],
        batch_size=2,
        shuffle=True,
    )
    before = state()
    scored(model, loader)
    assert state() == before
    assert_same(snapshot(model), weights)
    assert head.grad.eq(1).all()
    assert frozen.grad.eq(1).all()


def test_buffers_come_back_after_a_pass_in_training_mode():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return SimpleNamespace(loss=self.norm(self.linear(x)).pow(3).mean())

    model = get_peft_model(Normalised(), ChildTuningConfig(target_modules=["linear"], fisher="authors"))
    before = snapshot(model)
    scored(model, [{"x": torch.randn(8, 4)}])
    assert_same(snapshot(model), before)


def test_an_error_leaves_everything_as_it_was():
    model = unchosen("bert").train()
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="returned no loss"):
        chosen(model, [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert model.peft_config["default"].child_sizes is None
    with pytest.raises(RuntimeError, match="has not been chosen"):
        model(**bert_batch())


def test_tuples_with_a_forward_fn_and_a_loss_fn():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ChildTuningConfig(density=0.5, target_modules=["0"]))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    loss = nn.functional.mse_loss
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    whole = scored(model, loader, forward_fn=lambda model, batch: loss(model(batch[0]), batch[1]))
    split = scored(
        model,
        loader,
        forward_fn=lambda model, batch: model(batch[0]),
        loss_fn=lambda output, batch: loss(output, batch[1]),
    )
    assert_same(whole, split)
    with pytest.raises(
        ValueError, match=r"Batches must be mappings of tensors .* got a list without.*pass a forward_fn"
    ):
        scored(model, loader)


def collect(batches, **options):
    """The single examples that a Fisher pass sees."""
    seen = []
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ChildTuningConfig(density=0.5, target_modules=["0"]))

    def forward(model, batch):
        seen.append(batch)
        return model(torch.randn(1, 4)).square().sum()

    select_child_network(model, batches, forward_fn=forward, progress_bar=False, **options)
    examples = model.peft_config["default"].fisher_examples
    if examples > 1:
        del seen[2]  # the first two together, for comparison
    assert len(seen) == examples
    return seen


def shapes(batch):
    return {key: tuple(value.shape) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_what_else_is_in_a_batch_is_taken_apart_or_shared():
    batch = {
        "labels": torch.randn(2, 4),
        "text": ["a", "b"],
        "scale": torch.ones(1, 3),
        "flag": True,
        "s": torch.ones(()),
    }
    assert [shapes(example) for example in collect([batch])] == [
        {"labels": (1, 4), "text": [text], "scale": (1, 3), "flag": True, "s": ()} for text in "ab"
    ]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_batches_without_tensors_and_named_tuples():
    assert collect([{"ids": [0, 1, 2]}]) == [{"ids": [0]}, {"ids": [1]}, {"ids": [2]}]
    examples = collect([Pair(torch.zeros(2, 3), torch.ones(2))])
    assert [type(example) for example in examples] == [Pair, Pair]
    assert examples[0].x.shape == (1, 3)


def test_a_batch_of_one_is_never_cut():
    graph = {"nodes": torch.randn(5, 4), "label": torch.zeros(1)}
    assert [shapes(example) for example in collect([graph])] == [{"nodes": (5, 4), "label": (1,)}]
    packed = {"input_ids": torch.ones(1, 8), "labels": torch.ones(1, 8), "cu_seq_lens": torch.zeros(4)}
    assert len(collect([packed])) == 1
    several = {"nodes": torch.randn(5, 4), "edges": torch.randn(7, 2)}
    assert len(collect([several], split_batches=False)) == 1
    with pytest.raises(ValueError, match=r"agree in their first dimension.*\(5, 4\), \(7, 2\).*split_batches=False"):
        collect([several])
    with pytest.raises(ValueError, match=r"agree in their first dimension.*\(2, 4\), \(1, 3\)"):
        collect([{"x": torch.randn(2, 4), "y": torch.randn(1, 3)}])


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss}, lambda loss: (loss, None), lambda loss: loss])
def test_outputs_of_every_kind(wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return wrap(self.linear(x).square().sum())

    model = get_peft_model(Model(), ChildTuningConfig(target_modules=["linear"]))
    assert chosen(model, [{"x": torch.randn(2, 4)}])


def test_a_loss_that_depends_on_no_target():
    model = unchosen("linear")
    batch = [batch_of("linear")]
    with pytest.raises(ValueError, match="No score is positive"):
        chosen(model, batch, loss_fn=lambda output, batch: output.loss * 0)
    with pytest.raises(ValueError, match="loss of example 0 does not depend on any targeted weight"):
        chosen(model, batch, loss_fn=lambda output, batch: output.loss.detach())
    assert not child_of(model)


def test_scoring_sees_the_base_whatever_other_adapters_target():
    expected = scored(
        get_peft_model(build("linear"), config_for("linear", target_modules=["body.0"])), [batch_of("linear")]
    )
    other = config_for("linear", target_modules=["body.2"], variant="random", init_weights=False)
    model = get_peft_model(build("linear"), other, adapter_name="other")
    model.add_adapter("second", config_for("linear", target_modules=["body.0"]))
    model.base_model.set_adapter(["other", "second"])
    assert_same(scored(model, [batch_of("linear")], adapter_name="second"), expected)
    result = select_child_network(model, scores=expected, adapter_name="second")
    assert result.dense == 0
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="'other' is merged into the base model"):
        scored(model, [batch_of("linear")], adapter_name="second")


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
    assert "34 entries besides are trained densely" in str(result)


def test_scoring_a_second_adapter_ignores_the_first():
    model = unchosen("linear")
    batch = batch_of("linear")
    expected = scored(model, [batch])
    select_child_network(model, scores=expected)
    move(model)
    model.add_adapter("second", config_for("linear"))
    with pytest.raises(ValueError, match=r"'second' is not active; call model.set_adapter\('second'\)"):
        scored(model, [batch], adapter_name="second")
    model.set_adapter("second")
    assert_same(scored(model, [batch], adapter_name="second"), expected)


def test_data_or_scores():
    model = unchosen("linear")
    for arguments in ({}, {"dataloader": [], "scores": {}}):
        with pytest.raises(ValueError, match="either a dataloader or scores, got both or neither"):
            select_child_network(model, **arguments)


def test_an_empty_loader():
    with pytest.raises(ValueError, match="at least one example, got none"):
        chosen(unchosen("linear"), [])


def test_a_loss_that_is_not_finite_names_the_example():
    batch = batch_of("linear")
    batch["labels"][2, 0] = float("nan")
    with pytest.raises(ValueError, match="that of example 2 is nan"):
        chosen(unchosen("linear"), [batch])


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
        (lambda s: s.update({"body.0.bias": torch.ones(3)}), r"those of 'body.0.bias' have \(3,\), .*\(8,\)"),
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


def test_gradient_modes_of_the_caller_do_not_matter():
    model = unchosen("linear")
    expected = scored(model, [batch_of("linear")])
    with torch.no_grad():
        assert_same(scored(model, [batch_of("linear")]), expected)


def with_reference(model, batch):
    """As for preferences: the same model without adapters is the reference."""
    output = model(**batch)
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    return output


@pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled")
@pytest.mark.parametrize("fisher", ["per_example", "authors"])
def test_a_forward_pass_that_switches_adapters_off_and_on_changes_no_score(fisher):
    def model():
        torch.manual_seed(0)
        base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return get_peft_model(base, config_for("bert", fisher=fisher))

    batches = [batch_of("bert", seed) for seed in range(2)]
    expected = estimate_fisher(model(), batches, progress_bar=False)
    assert_same(estimate_fisher(model(), batches, forward_fn=with_reference, progress_bar=False), expected)


@pytest.mark.parametrize("where", [{"score_device": "cpu"}, {"score_folder": "scores"}])
def test_scores_kept_elsewhere_are_the_same(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(build("bert"), config_for("bert"))
    batches = [batch_of("bert", seed) for seed in range(2)]
    expected = estimate_fisher(model, batches, progress_bar=False)
    for _ in range(2):  # files of an earlier pass give way
        assert_same(estimate_fisher(model, batches, progress_bar=False, **where), expected)
    files = sorted(tmp_path.glob("scores/*.float32"))
    assert [file.name for file in files] == sorted(f"{name}.float32" for name in expected if "score_folder" in where)
    for file in files:
        found = np.fromfile(file, dtype=np.float32)
        assert np.array_equal(found, expected[file.name.removesuffix(".float32")].flatten().numpy())
    select_child_network(model, batches, progress_bar=False, **where)
    twin = get_peft_model(build("bert"), config_for("bert"))
    select_child_network(twin, batches, progress_bar=False)
    assert_same(child_of(model), child_of(twin))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_the_cpu_of_a_model_on_a_gpu():
    batches = [batch_of("bert", seed) for seed in range(2)]
    model = get_peft_model(build("bert"), config_for("bert")).cuda()
    beside = estimate_fisher(model, batches, progress_bar=False)
    apart = estimate_fisher(model, batches, progress_bar=False, score_device="cpu")
    for name, score in beside.items():
        assert (score.device.type, apart[name].device.type) == ("cuda", "cpu")
        torch.testing.assert_close(apart[name], score.cpu())
