"""A child network in a base whose weights are quantised to int8, by torchao if it is installed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, TorchAoConfig

from peft_child import estimate_fisher, select_child_network, weight_magnitudes
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.quantised import is_quantised

from ..helpers import assert_same, child_of, config_for, logits, snapshot, train
from ..problems import batch_of, build
from ..selection.test_batch_scorer import assert_close


# torchao warns of enumerations that torch has come to know, and of extensions that need a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Int8(torch.Tensor):
    """A weight in 8 bits with a scale for each row, which looks like a dense one; for what torchao's tensors do."""

    @staticmethod
    def __new__(cls, values, scales):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype)

    def __init__(self, values, scales):
        self.values_, self.scales_ = values, scales

    @classmethod
    def of(cls, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def dequantize(self):
        return self.values_.to(self.scales_.dtype) * self.scales_

    def __tensor_flatten__(self):
        return ["values_", "scales_"], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return Int8(inner["values_"], inner["scales_"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values_, args[0].scales_)
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)


def by_ourselves(base):
    for path, module in base.named_modules():
        if is_inner(module, path):
            module.weight = torch.nn.Parameter(Int8.of(module.weight.detach()), requires_grad=False)


def by_torchao(base):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: run make quantised")
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig(), filter_fn=is_inner)


def is_inner(module, path):
    return isinstance(module, torch.nn.Linear) and "lm_head" not in path


@pytest.fixture(params=[by_ourselves, by_torchao], ids=lambda quantise: quantise.__name__)
def quantised(request):
    """Builds a Llama with quantised layers."""

    def build_quantised():
        base = build("llama")
        request.param(base)
        return base

    return build_quantised


def dense_twin(base):
    """The same model with the quantised weights unpacked."""
    twin = build("llama")
    twin.load_state_dict({name: value.dequantize() for name, value in base.state_dict().items()})
    return twin


def model_of(base, **changes):
    return get_peft_model(base, config_for("llama", target_modules=["q_proj", "down_proj"], **changes))


@pytest.mark.parametrize("variant", ["random", "task_free"])
def test_training_equals_that_on_the_dequantised_base(tmp_path, variant, quantised):
    base = quantised()
    packed = {name: value for name, value in base.named_parameters() if type(value) is not torch.nn.Parameter}
    assert len(packed) == 14
    twin = dense_twin(base)
    model, plain = model_of(base, variant=variant), model_of(twin, variant=variant)
    batches = [batch_of("llama", seed) for seed in range(3)]
    for layer in child_tuning_layers(model).values():
        with torch.no_grad():
            composed = layer.weight
        assert not is_quantised(composed)
    # Weights outside of the targets run as torchao runs them; only the targets are compared, in one layer alone.
    train(model, batches)
    train(plain, batches)
    found = {name: value for name, value in snapshot(model).items() if "child_delta" in name}
    for name, value in snapshot(plain).items():
        if "child_delta" in name:
            assert found[name].any()
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)  # steps of 1e-2

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(), tmp_path)  # warnings are errors: no complaint of another base
    assert torch.equal(logits(loaded, batch_of("llama")), logits(model, batch_of("llama")))


def test_magnitudes_are_those_of_the_dequantised_base(quantised, granularity):
    base = quantised()
    twin = dense_twin(base)
    assert_same(*(weight_magnitudes(model_of(each, granularity=granularity)) for each in (base, twin)))


def test_the_composed_weight_is_the_dequantised_one_with_the_child(quantised):
    base = quantised()
    twin = dense_twin(base)
    model, plain = model_of(base, variant="random"), model_of(twin, variant="random")
    train(model, [batch_of("llama")])
    plain.load_state_dict({name: value for name, value in snapshot(model).items() if "child_" in name}, strict=False)
    plain.merge_adapter()
    merged = {name: layer.base_layer.weight for name, layer in child_tuning_layers(plain).items()}
    for name, layer in child_tuning_layers(model).items():
        with torch.no_grad():
            assert torch.equal(layer.weight, merged[name])
        x = torch.randn(2, layer.in_features)
        assert torch.equal(layer(x), functional_call(layer.base_layer, {"weight": merged[name]}, (x,)))


def test_the_choice_is_made_in_the_quantised_model(quantised, granularity):
    """As in the same model with unpacked weights: no gradient of a quantised weight is needed."""
    batches = [batch_of("llama", seed) for seed in range(2)]
    base = quantised()
    twin = dense_twin(base)
    found = []
    for each in (base, twin):
        model = model_of(each, granularity=granularity)
        found.append(estimate_fisher(model, batches, progress_bar=False))
        select_child_network(model, batches, progress_bar=False)
        found.append(child_of(model))
    assert_close(found[0], found[2])
    assert_same(found[1], found[3])


def test_merging_is_refused_if_nothing_says_how_to_quantise(quantised):
    model = model_of(quantised(), variant="random", init_weights=False)
    expected = logits(model, batch_of("llama"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"proj.weight' is quantised \(Int8\w*\), and PEFT cannot quantise it again"
        ):
            merge()
    assert torch.equal(logits(model, batch_of("llama")), expected)


def by_config(tmp_path, config):
    """A model that transformers has quantised, so that it knows how."""
    build("llama").save_pretrained(tmp_path / "base")
    quantisation = TorchAoConfig(config)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation, dtype="float32")


CONFIGS = {
    "int8": lambda torchao: torchao.Int8WeightOnlyConfig(),
    "int8_dynamic": lambda torchao: torchao.Int8DynamicActivationInt8WeightConfig(),
    "int4": lambda torchao: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": lambda torchao: torchao.Float8WeightOnlyConfig(),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_reach_every_layer_of_what_transformers_has_quantised(tmp_path, kind, granularity):
    """Kernels that pass no gradients on are left out; those with rounded inputs compute nearly the same."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: run make quantised")
    base = by_config(tmp_path, CONFIGS[kind](torchao))
    found = []
    for each in (base, dense_twin(base)):
        model = get_peft_model(each, config_for("llama", target_modules="all-linear", granularity=granularity))
        found.append(estimate_fisher(model, [batch_of("llama")], progress_bar=False))
    assert_close(*found, 1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_and_merging_what_transformers_has_quantised(tmp_path, kind, granularity):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: run make quantised")
    model = model_of(by_config(tmp_path, CONFIGS[kind](torchao)))
    batch = batch_of("llama")
    select_child_network(model, [batch], progress_bar=False)
    packed = {name: layer.base_layer.weight for name, layer in child_tuning_layers(model).items()}
    assert all(map(is_quantised, packed.values()))
    train(model, [batch] * 3)
    unmerged = logits(model, batch)
    with model.disable_adapter():
        base = logits(model, batch)
    with pytest.warns(UserWarning, match="Merging into the quantised weight"):
        model.merge_adapter()
    layers = child_tuning_layers(model)
    assert all(is_quantised(layer.base_layer.weight) for layer in layers.values())
    assert (logits(model, batch) - unmerged).abs().max() < (base - unmerged).abs().max() / 2
    model.unmerge_adapter()
    assert all(layer.base_layer.weight is packed[name] for name, layer in layers.items())
    assert torch.equal(logits(model, batch), unmerged)
