"""Squared gradients of one loss at a time, which input channels get without the gradient of any weight."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_child import ChildTuningConfig, estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.selection.loss import Loss
from peft_child.selection.loss_squares import LossSquares
from peft_child.tensors.channels import ChannelLayout

from ..helpers import assert_same, child_of, config_for
from ..problems import Regression, batch_of, build
from .test_batch_scorer import assert_close


class Untrainable(torch.Tensor):
    """A weight that cannot take gradients, as packed ones cannot."""

    def requires_grad_(self, required=True):
        if required:
            raise RuntimeError("asked for a gradient")
        return super().requires_grad_(False)


def untrainable(base):
    """A model whose linear and embedding weights cannot take gradients."""
    for module in base.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Untrainable), requires_grad=False)
    return base


@pytest.mark.parametrize(
    ("fisher", "split_batches"), [("per_example", True), ("per_example", False), ("authors", True)]
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_channels_are_chosen_without_the_gradient_of_any_weight(name, fisher, split_batches):
    def scores(base):
        modules = [path for path, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
        config = ChildTuningConfig(granularity="input_channel", density=0.3, target_modules=modules, fisher=fisher)
        model = get_peft_model(base, config)
        torch.manual_seed(0)
        found = estimate_fisher(model, batches, split_batches=split_batches, progress_bar=False)
        select_child_network(model, scores=found)
        return found, child_of(model)

    batches = [batch_of(name, seed) for seed in range(2)]
    found, chosen = scores(untrainable(build(name)))
    expected, as_usual = scores(build(name))
    assert_same(found, expected)
    assert_same(chosen, as_usual)


class UsedElsewhere(nn.Module):
    """A linear layer whose weight is used a second time, without calling the layer."""

    def __init__(self, always):
        super().__init__()
        self.first, self.second, self.always = nn.Linear(4, 4), nn.Linear(4, 4), always

    def forward(self, x):
        hidden = self.second(self.first(x).tanh())
        return hidden + F.linear(hidden, self.first.weight) if self.always or x[0, 0] > 0 else hidden


@pytest.mark.parametrize("always", [True, False])
def test_weights_that_are_used_without_their_modules_are_scored_as_well(always):
    """Also if only some examples use them so."""

    def scores(granularity):
        torch.manual_seed(0)
        config = ChildTuningConfig(
            granularity=granularity, density=0.5, target_modules=["body.first", "body.second"], fisher="per_example"
        )
        model = get_peft_model(Regression(UsedElsewhere(always)), config)
        layouts = {k: v for layer in child_tuning_layers(model).values() for k, v in layer.layouts("default").items()}
        return layouts, estimate_fisher(model, batches, progress_bar=False)

    torch.manual_seed(1)
    batches = [{"x": torch.randn(1, 4), "labels": torch.randn(1, 4)} for _ in range(6)]
    assert len({bool(batch["x"][0, 0] > 0) for batch in batches}) == 2
    layouts, found = scores("input_channel")
    assert_close(found, {name: layouts[name].sums(score) for name, score in scores("entry")[1].items()})


class ChangedInPlace(nn.Module):
    """Changes what a layer returns, which is a view for inputs of three dimensions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(F.relu(self.first(x), inplace=True)).mul_(2)


class Penalised(ChangedInPlace):
    """Computes a gradient in its forward pass, which goes through the layer as well."""

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        hidden = self.first(x).tanh()
        (slope,) = torch.autograd.grad(hidden.sum(), x, create_graph=True)
        return self.second(hidden) + slope


class Failing(ChangedInPlace):
    """Calls a layer in vain, and uses its weight afterwards."""

    def forward(self, x):
        try:
            self.first(x[..., :3])
        except RuntimeError:
            x = F.linear(x, self.first.weight)
        return self.second(x)


class Hooked(ChangedInPlace):
    """The gradient of a weight is changed by a hook."""

    def __init__(self):
        super().__init__()
        self.first.weight.register_hook(lambda gradient: 3 * gradient)


class OutputHooked(ChangedInPlace):
    """The gradient of what a layer returns is changed by a hook."""

    def forward(self, x):
        hidden = self.first(x)
        hidden.register_hook(lambda gradient: 3 * gradient)
        return self.second(hidden.tanh())


class Viewed(ChangedInPlace):
    """Uses a view of a weight that was made before."""

    def __init__(self):
        super().__init__()
        self.view = self.first.weight.t()

    def forward(self, x):
        return self.second((x @ self.view).tanh()) + self.first(x)


class Sparse(ChangedInPlace):
    """Calls a layer with a sparse tensor."""

    def forward(self, x):
        flat = x.reshape(-1, 4).to_sparse()
        return self.second(self.first(flat).view(x.shape).tanh())


class Empty(ChangedInPlace):
    """Calls a layer without tokens."""

    def forward(self, x):
        return self.second(torch.cat([self.first(x[:, :0]), x], 1))


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("kind", [ChangedInPlace, Penalised, Failing, Hooked, OutputHooked, Viewed, Sparse, Empty])
def test_models_that_do_more_than_call_their_layers(kind, examples):
    def scores(granularity):
        torch.manual_seed(0)
        config = ChildTuningConfig(
            granularity=granularity, density=0.5, target_parameters=["body.first.weight", "body.second.weight"]
        )
        model = get_peft_model(Regression(kind()), config)
        layouts = {k: v for layer in child_tuning_layers(model).values() for k, v in layer.layouts("default").items()}
        return layouts, estimate_fisher(model, batches, progress_bar=False)

    torch.manual_seed(1)
    batches = [{"x": torch.randn(examples, 3, 4), "labels": torch.randn(examples, 3, 4)} for _ in range(4)]
    layouts, found = scores("input_channel")
    assert_close(found, {name: layouts[name].sums(score) for name, score in scores("entry")[1].items()})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_of_models_under_autocast(dtype):
    """Autocast of the model, and of whoever calls it."""

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.second(self.first(x)).float()

    def scores(granularity):
        torch.manual_seed(0)
        config = ChildTuningConfig(
            granularity=granularity, density=0.5, target_modules=["body.first", "body.second"], fisher="per_example"
        )
        model = get_peft_model(Regression(Autocast()), config)
        layouts = {k: v for layer in child_tuning_layers(model).values() for k, v in layer.layouts("default").items()}
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return layouts, estimate_fisher(model, batches, progress_bar=False)

    torch.manual_seed(1)
    batches = [{"x": torch.randn(4, 3, 4), "labels": torch.randn(4, 3, 4)} for _ in range(2)]
    layouts, found = scores("input_channel")
    assert_close(found, {name: layouts[name].sums(score) for name, score in scores("entry")[1].items()}, 1e-2)


def test_hooks_of_all_modules_come_before_ours():
    config = ChildTuningConfig(granularity="input_channel", density=0.5, target_modules=["body.first", "body.second"])
    batches = [{"x": torch.randn(4, 3, 4), "labels": torch.randn(4, 3, 4)} for _ in range(2)]
    found = {}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    try:
        for granularity in ("input_channel", "entry"):
            torch.manual_seed(0)
            config.granularity = granularity
            model = get_peft_model(Regression(ChangedInPlace()), config)
            found[granularity] = estimate_fisher(model, batches, progress_bar=False)
    finally:
        handle.remove()
    sums = {name: score.sum(0) if score.dim() > 1 else score.sum(0, True) for name, score in found["entry"].items()}
    assert_close(found["input_channel"], sums)


def test_an_input_that_is_changed_after_the_call_is_an_error_as_in_training():
    class Changing(ChangedInPlace):
        def forward(self, x):
            hidden = self.first(x).tanh()
            result = self.second(hidden)
            hidden.detach().mul_(2)
            return result

    config = ChildTuningConfig(granularity="input_channel", density=0.5, target_modules=["body.first", "body.second"])
    model = get_peft_model(Regression(Changing()), config)
    batch = {"x": torch.randn(4, 3, 4), "labels": torch.randn(4, 3, 4)}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        estimate_fisher(model, [batch], progress_bar=False)


@pytest.mark.parametrize("max_norm", [None, 0.01, 100.0])
def test_a_loss_over_a_batch_is_squared_as_it_is(max_norm):
    torch.manual_seed(0)
    model = Regression(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))).requires_grad_(False)
    batch = {"x": torch.randn(5, 4), "labels": torch.randn(5, 2)}
    targets = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}
    layouts = {name: ChannelLayout(1, *parameter.shape, 1) for name, parameter in targets.items()}
    found = {name: torch.zeros(layout.number) for name, layout in layouts.items()}
    norms = {}
    squares = LossSquares(Loss(model, None, None), targets, found, layouts, max_norm)
    loss = squares.add(batch, 0, norms.__setitem__)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for parameter in targets.values():
        parameter.requires_grad_(True)
    expected = model(**batch).loss
    assert loss == expected.item()
    expected.backward()
    for name, parameter in targets.items():
        torch.testing.assert_close(norms[name], parameter.grad.square().sum(dtype=torch.float64), rtol=1e-6, atol=0)
        if max_norm is not None:
            nn.utils.clip_grad_norm_([parameter], max_norm)
        torch.testing.assert_close(found[name], parameter.grad.square().sum(0), rtol=1e-5, atol=1e-12)


def test_an_error_of_the_model_leaves_nothing_behind():
    model = get_peft_model(build("bert"), config_for("bert", granularity="input_channel", density=0.5))
    before = [parameter.requires_grad for parameter in model.parameters()]
    batch = batch_of("bert")
    with pytest.raises(IndexError):
        estimate_fisher(model, [{**batch, "input_ids": batch["input_ids"] + 10_000}], progress_bar=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
