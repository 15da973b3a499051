"""One pass over the data, and a model that comes back as it was."""

import io
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from peft_child import ChildTuningConfig, estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, config_for, snapshot
from ..problems import batch_of, bert_batch, build, tiny_bert
from .test_select import chosen, examples_of, scored, unchosen


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
    with pytest.raises(ValueError, match=r"or a loss_fn\. Rename 'label' to 'labels'\."):
        chosen(model, [{"input_ids": torch.ones(2, 3, dtype=torch.int64), "label": torch.ones(2)}])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert model.peft_config["default"].child_sizes is None
    with pytest.raises(RuntimeError, match="has not been chosen"):
        model(**bert_batch())


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


def test_an_empty_loader():
    with pytest.raises(ValueError, match="at least one example, got none"):
        chosen(unchosen("linear"), [])


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


def test_scores_that_do_not_fit_are_refused_before_the_first_is_made(monkeypatch, tmp_path):
    model = get_peft_model(build("llama"), config_for("llama"))
    batches = [batch_of("llama")]
    needed = 4 * sum(layer.base_parameter(key).numel() for layer, key in targets_of(model))
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if fits:
            expected = estimate_fisher(model, batches, progress_bar=False)
    message = rf"take 4 bytes for each targeted weight, {needed / 1e9:.1f} GB on cpu.*use granularity='input_channel'"
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, batches, progress_bar=False)
    assert_same(estimate_fisher(model, batches, progress_bar=False, score_folder=tmp_path), expected)
    by_channel = get_peft_model(build("llama"), config_for("llama", granularity="input_channel"))
    select_child_network(by_channel, batches, progress_bar=False)


def targets_of(model):
    return [(layer, key) for layer in child_tuning_layers(model).values() for key in layer.targets_of("default")]


class Stream(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "notebook", "wanted", "shown"),
    [
        (True, False, True, True),
        (False, False, True, False),  # a log file
        (False, True, True, True),
        (True, False, False, False),
    ],
)
def test_the_bar_is_for_terminals_and_notebooks(monkeypatch, terminal, notebook, wanted, shown):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    estimate_fisher(unchosen("bert"), [batch_of("bert")], progress_bar=wanted)
    assert ("Fisher information" in sys.stderr.getvalue()) == shown
