"""Child networks in linear layers that keep their weight packed: bitsandbytes, HQQ and GGUF."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import quantization_utils
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_child import estimate_fisher, select_child_network
from peft_child.layers.layer import child_tuning_layers
from peft_child.layers.packed import packed_weight, parameters_of
from peft_child.tensors.quantised import PackedWeight, dense

from ..helpers import assert_same, checkpoint_activations, child_of, config_for, logits, move, train
from ..problems import batch_of
from ..selection.test_batch_scorer import assert_close


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TARGETS = ["q_proj", "down_proj"]


def nf4(linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: run make quantised")
    bias = linear.bias is not None
    packed = bnb.nn.Linear4bit(
        *(linear.in_features, linear.out_features, bias),
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    packed.load_state_dict(linear.state_dict())
    packed.support_avx512bf16_for_cpu = False  # as in our layers, for the outputs without them
    return packed.to("cpu")


def int8(linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: run make quantised")
    bias = linear.bias is not None
    packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


@torch.no_grad()
def hqq(linear):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed: run make quantised")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


def gguf(linear):
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed: run make quantised")
    from transformers.integrations.gguf.utils import GgufLinear

    packed = GgufLinear(linear.in_features, linear.out_features, ggml_type=8, bias=linear.bias is not None)
    blocks = quants.quantize(linear.weight.detach().numpy(), quants.GGMLQuantizationType.Q8_0)
    packed.weight.data = torch.from_numpy(blocks)
    if linear.bias is not None:
        packed.bias.data = linear.bias.detach().clone()
    return packed


KINDS = [nf4, int8, hqq, gguf]  # without double quantisation: see test_packed_training.py
GRANULARITIES = ["entry", "input_channel"]


def plain_base():
    """A tiny Llama whose widths quantisers can divide into blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


def base_of(quantise):
    """The same with packed linear layers."""
    base = plain_base()
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            base.set_submodule(path, quantise(module))
    return base


def dense_twin(base):
    """The same model with every weight unpacked."""
    twin = copy.deepcopy(base)
    for path, module in list(twin.named_modules()):
        packed = packed_weight(module)
        if packed is not None:
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = dense(packed).float()
            if module.bias is not None:
                linear.bias.data = module.bias.detach().clone()
            twin.set_submodule(path, linear)
    return twin


def packed_bits(base):
    """Everything that packed layers hold."""
    layers = {name: module for name, module in base.named_modules() if packed_weight(module) is not None}
    assert len(layers) == 14
    return {
        f"{name.removesuffix('.base_layer')}.{key}": value.clone()
        for name, module in layers.items()
        for key, value in module.state_dict().items()
        if isinstance(value, torch.Tensor) and "child_" not in key
    }


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def quantise(request):
    return request.param


@pytest.fixture
def layer_pair(quantise):
    """One layer alone with its dense twin, so that nothing else rounds."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=quantise is not hqq)  # the bias of HQQ is no parameter
    packed = nn.Sequential(quantise(linear))
    return packed, dense_twin(packed)


def layer_model(base, **changes):
    return get_peft_model(base, config_for("llama", target_modules=["0"], task_type=None, **changes))


@pytest.mark.parametrize("variant", ["random", "task_free"])
def test_gradients_are_those_on_the_unpacked_weight(layer_pair, granularity, variant):
    x = torch.randn(5, 7, 64)
    found = []
    for base in layer_pair:
        model = layer_model(base, variant=variant, granularity=granularity)
        torch.manual_seed(1)
        move(model)
        torch.manual_seed(2)
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        (y * torch.randn(y.shape)).sum().backward()
        (layer,) = child_tuning_layers(model).values()
        found.append((y, inputs.grad, {name: delta.grad for name, delta in layer.child_delta["default"].items()}))
        assert set(found[-1][2]) == {"weight", "bias"} & set(dict(layer.base_layer.named_parameters())) | {"weight"}
    (y, of_x, of_deltas), (expected, of_x_expected, expected_deltas) = found
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(of_x, of_x_expected, rtol=0, atol=1e-5)
    for name, gradient in of_deltas.items():
        torch.testing.assert_close(gradient, expected_deltas[name], rtol=0, atol=1e-5)
        assert gradient.any() or name == "bias"  # which is one channel, and may be masked


def test_a_fresh_adapter_changes_no_bit(quantise, granularity):
    base = base_of(quantise)
    batch = rows(batch_of("llama"))
    expected = logits(base, batch)
    model = model_of(base, variant="random", granularity=granularity)
    found = logits(model, batch)
    if granularity == "input_channel":
        assert torch.equal(found, expected)
    else:  # on the unpacked weight: the int8 kernel rounds its inputs, too
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if quantise is int8 else 1e-5)


def model_of(base, **changes):
    return get_peft_model(base, config_for("llama", target_modules=TARGETS, **changes))


def rows(batch):
    """More tokens, since a kernel that is not on this machine runs up to eight rows of GGUF."""
    return {name: torch.cat([torch.cat([value, value.flip(1)], 1)] * 2) for name, value in batch.items()}


@pytest.mark.parametrize("variant", ["task_driven", "random", "task_free"])
def test_training_saving_and_loading(tmp_path, quantise, granularity, variant):
    base = base_of(quantise)
    before = packed_bits(base)
    twin = dense_twin(base)
    model = model_of(base, variant=variant, granularity=granularity)
    batches = [rows(batch_of("llama", seed)) for seed in range(3)]
    if variant == "task_driven":
        select_child_network(model, batches, progress_bar=False)
    losses = []
    for _ in range(3):
        model.train()
        train(model, batches)
        losses.append(model(**batches[0]).loss.item())
    assert losses[2] < losses[0]
    assert_same(packed_bits(base), before)

    model.save_pretrained(tmp_path)
    expected = logits(model, batches[0])
    again = PeftModel.from_pretrained(base_of(quantise), tmp_path)  # warnings are errors: no other base
    assert torch.equal(logits(again, batches[0]), expected)
    on_dense = PeftModel.from_pretrained(twin, tmp_path)
    torch.testing.assert_close(logits(on_dense, batches[0]), expected, rtol=0, atol=0.1 if quantise is int8 else 1e-4)


def test_adapters_of_a_dense_base_load(tmp_path, quantise, granularity):
    model = model_of(plain_base(), variant="random", granularity=granularity)
    move(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="made on a base model that was not quantised.* not compared") as warned:
        loaded = PeftModel.from_pretrained(base_of(quantise), tmp_path)
    assert sum("not compared" in str(each.message) for each in warned) == 1
    assert_same(child_of(loaded), child_of(model))
    PeftModel.from_pretrained(base_of(quantise), tmp_path, check_base="off")  # warnings are errors


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_that_bitsandbytes_packs_anew_for_the_cpu(granularity):
    """It does so when a layer first infers, if the CPU has AVX512-BF16."""
    packed = nf4(nn.Linear(64, 32, bias=False)).eval()
    packed.support_avx512bf16_for_cpu = True
    if not type(packed)(64, 32).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    x = torch.randn(3, 64)
    with torch.no_grad():
        packed(x)
    assert packed.weight.quant_state.packing_format_for_cpu
    restored = copy.deepcopy(packed)
    restored.state_dict()
    restored.support_avx512bf16_for_cpu = False
    model = layer_model(nn.Sequential(packed), variant="random", granularity=granularity).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), restored(x), rtol=0, atol=1e-6)
        move(model)
        weight = dense(packed_weight(restored)) + model.base_model.model[0].get_delta_weight("default")
        torch.testing.assert_close(model(x), nn.functional.linear(x, weight), rtol=0, atol=1e-5)
    assert not packed.weight.quant_state.packing_format_for_cpu


def test_scores_are_those_of_the_unpacked_weights(quantise, granularity):
    if quantise is int8:
        pytest.skip("the int8 kernel rounds its inputs, so no dense model computes the same; see the next test")
    base = base_of(quantise)
    batches = [rows(batch_of("llama", seed)) for seed in range(2)]
    found, expected = [], []
    for each, results in ((base, found), (dense_twin(base), expected)):
        model = model_of(each, granularity=granularity)
        results.append(estimate_fisher(model, batches, progress_bar=False))
        select_child_network(model, batches, progress_bar=False)
        results.append(child_of(model))
    assert_close(found[0], expected[0], 1e-4)
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("fisher", ["per_example", "authors"])
def test_scores_of_one_layer_equal_the_definition(layer_pair, granularity, fisher):
    packed, twin = layer_pair
    batches = [{"input": torch.randn(4, 64)} for _ in range(2)]
    found = []
    for base in (packed, twin):
        if fisher == "authors":
            base.train()
        model = layer_model(base, granularity=granularity, fisher=fisher)
        found.append(
            estimate_fisher(
                model,
                batches,
                forward_fn=lambda model, batch: model(batch["input"]),
                loss_fn=lambda output, batch: (output @ torch.arange(32.0)).mean(),  # int8 rounds the output
                progress_bar=False,
            )
        )
    assert_close(found[0], found[1], 1e-5)


def test_merging_rounds_and_unmerging_is_exact(quantise, granularity):
    base = base_of(quantise)
    model = model_of(base, variant="random", granularity=granularity)
    move(model, 0.02)
    batch = rows(batch_of("llama"))
    unmerged, before = logits(model, batch), packed_bits(base)
    plain = logits_of_base(model, batch)
    if quantise is gguf:
        with pytest.raises(
            ValueError, match=r"is quantised \(GgufLinear\), and PEFT cannot quantise it again.*`peft-child merge"
        ):
            model.merge_adapter()
    else:
        with pytest.warns(UserWarning, match="Merging into the quantised weight"):
            model.merge_adapter()
        merged = logits(model, batch)
        assert (merged - unmerged).abs().max() < (plain - unmerged).abs().max()
        layer = next(iter(child_tuning_layers(model).values()))
        assert packed_weight(layer.base_layer) is not None
        model.unmerge_adapter()
        assert_same(packed_bits(base), before)
    assert torch.equal(logits(model, batch), unmerged)


def logits_of_base(model, batch):
    with model.disable_adapter():
        return logits(model, batch)


def test_merge_and_unload_leaves_a_quantised_model(quantise):
    if quantise is gguf:
        pytest.skip("GGUF cannot be quantised again; see the test above")
    model = model_of(base_of(quantise), variant="random", granularity="input_channel")
    names = model.state_dict().keys()
    move(model, 0.02)
    batch = rows(batch_of("llama"))
    replaced = [weakref.ref(layer.base_layer) for layer in child_tuning_layers(model).values()]
    with pytest.warns(UserWarning, match="Merging into the quantised weight"):
        model.merge_adapter()
    assert model.state_dict().keys() == names
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert not [module for module in replaced if module() is not None]
    assert not child_tuning_layers(merged)
    assert len(packed_bits(merged)) > 14
    assert torch.equal(logits(merged, batch), expected)


def test_several_adapters_and_mixed_batches(quantise):
    model = model_of(base_of(quantise), variant="random", granularity="input_channel")
    model.add_adapter("second", config_for("llama", target_modules=TARGETS, variant="random", seed=1))
    move(model)
    move(model, adapter_name="second")
    batch = rows(batch_of("llama"))
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model, batch)
    alone["__base__"] = logits_of_base(model, batch)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    assert all((both - each).abs().max() > 1e-3 for each in alone.values())
    if quantise is gguf:
        return  # rows of one adapter are few, and few rows run on a kernel that is not on this machine
    names = (["default", "second", "__base__"] * 3)[: len(batch["input_ids"])]
    model.set_adapter("default")
    found = logits(model, batch | {"adapter_names": names})
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone[name][row], rtol=0, atol=0.1 if quantise is int8 else 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where a compiled program is interrupted
@pytest.mark.parametrize("quantise", [nf4, gguf])
def test_a_compiled_model_computes_the_same(quantise, granularity):
    found = []
    for compiled in (False, True):
        model = model_of(base_of(quantise), variant="random", granularity=granularity, init_weights=False).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(**rows(batch_of("llama"))).loss
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        found.append({"loss": loss.detach(), **gradients})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(quantise, granularity, reentrant):
    found = []
    for checkpointing in (False, True):
        base = base_of(quantise)
        if checkpointing:
            checkpoint_activations(base, reentrant)
            base.enable_input_require_grads()
        model = model_of(base, variant="random", granularity=granularity).train()
        model(**rows(batch_of("llama"))).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert_same(*found)


def test_hooks_of_the_layer_change_what_goes_in_and_out(layer_pair, granularity):
    x, found = torch.randn(9, 64), []
    for base in layer_pair:
        model = layer_model(base, variant="random", granularity=granularity)
        torch.manual_seed(1)
        move(model)
        (layer,) = child_tuning_layers(model).values()
        layer.base_layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        layer.base_layer.register_forward_hook(lambda _, args, output: output * 3)
        y = model(x)
        y.square().sum().backward()
        found.append((y, layer.child_delta["default"]["weight"].grad))
    for first, second in zip(*found, strict=True):  # the gradients are sums of products of up to 100
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_methods_of_the_layer_are_its_own():
    model = model_of(base_of(hqq), variant="random")
    layer = next(iter(child_tuning_layers(model).values()))
    assert torch.equal(layer.dequantize(), layer.base_layer.dequantize())


def test_nothing_as_large_as_a_weight_is_kept(quantise, granularity):
    layer = get_peft_model(
        nn.Sequential(quantise(nn.Linear(512, 256))),
        config_for("llama", target_modules=["0"], task_type=None, variant="random", granularity=granularity),
    )
    kept = []
    x = torch.randn(9, 512, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    deltas = sum(value.numel() * 4 for name, value in layer.named_parameters() if value.requires_grad)
    packed = 512 * 256  # bitsandbytes keeps its packed weight, which is there anyway
    assert max(kept, default=0) <= max(deltas, packed)
    assert 512 * 256 * 4 not in kept


def test_what_peft_cannot_unpack_is_trained_by_channels(monkeypatch):
    """A layer as those of GPTQ, which only run forward."""

    class ForwardOnly(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
            self.register_buffer("qweight", linear.weight.detach().clone())

        def forward(self, x):
            return x @ self.qweight.T

    class Backend(quantization_utils.ForwardOnlyQuantizationBackend):
        pass

    def resolve(module, **_):
        return Backend("gptq") if isinstance(module, ForwardOnly) else None

    monkeypatch.setattr("peft_child.layers.packed.resolve_quantization_backend", resolve)
    base, plain = base_of(ForwardOnly), plain_base()
    with pytest.raises(ValueError, match=r"is in a ForwardOnly, whose weight cannot be unpacked.*input_channel"):
        model_of(base, variant="random", granularity="entry")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        model_of(base, variant="task_free", granularity="input_channel")
    batches = [batch_of("llama", seed) for seed in range(2)]
    found = []
    for each in (base, plain):
        model = model_of(each, granularity="input_channel")
        select_child_network(model, batches, progress_bar=False)
        train(model, batches)
        found.append(model)
    assert_same(child_of(found[0]), child_of(found[1]))
    torch.testing.assert_close(logits(found[0], batches[0]), logits(found[1], batches[0]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="PEFT cannot quantise it again"):
        found[0].merge_adapter()


def test_a_layer_that_is_not_linear_is_named():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: run make quantised")
    base = plain_base()
    embedding = bnb.nn.Embedding8bit(*base.model.embed_tokens.weight.shape)
    embedding.load_state_dict(base.model.embed_tokens.state_dict())
    base.model.embed_tokens = embedding.to("cpu")
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' of a Embedding8bit is a Int8Params of torch.int8"
    ):
        get_peft_model(base, config_for("llama", target_modules=["embed_tokens"], variant="random"))


def test_a_packed_weight_is_a_description(quantise):
    layer = quantise(nn.Linear(64, 32))
    weight = parameters_of(layer)["weight"]
    assert isinstance(weight, PackedWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 64), torch.float32, "cpu")
    assert weight.detach().shape == weight.shape
    with pytest.raises(RuntimeError, match="packed weight: unpack it"):
        weight + 1
    assert "PackedWeight" in repr(weight)


def test_lora_takes_what_we_take(quantise):
    """The refusals are not stricter than LoRA's."""
    base = base_of(quantise)
    if quantise is gguf:
        with pytest.raises(ValueError, match="Target module GgufLinear"):
            get_peft_model(base, LoraConfig(target_modules=TARGETS))
    else:
        get_peft_model(base, LoraConfig(target_modules=TARGETS))


def test_conversion_to_lora_sees_the_change(quantise):
    model = model_of(base_of(quantise), variant="random", granularity="input_channel")
    move(model)
    layer = next(iter(child_tuning_layers(model).values()))
    assert layer.supports_lora_conversion()
    change = layer.get_delta_weight("default")
    x = torch.randn(9, layer.in_features)
    with torch.no_grad():
        expected = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(x @ change.T, expected, rtol=0, atol=1e-5)
