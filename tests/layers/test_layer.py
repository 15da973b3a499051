"""Layers around modules of any kind, and calls off the beaten path."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from peft_child import ChildTuningConfig, FormatError
from peft_child.layers.layer import child_tuning_layers

from ..helpers import chosen_model, logits
from ..problems import Regression, batch_of, bert_batch, build
from ..tensors.test_compose import saved_bytes


class Encoder(nn.Module):
    """torch's own encoder reads most parameters of its attention without calling it, for its fast path."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("targets", ["self_attn", "encoder", "linear1"])
def test_the_transformer_of_torch(targets):
    base = Regression(Encoder()).eval()
    config = ChildTuningConfig(variant="random", density=0.3, init_weights=False, target_modules=[targets])
    model = get_peft_model(base, config)
    batch = {"x": torch.randn(3, 5, 8), "labels": torch.randn(3, 5, 8)}
    result = logits(model, batch)
    model(**batch).loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "child_delta" in key)
    assert torch.equal(logits(model.merge_and_unload(), batch), result)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def test_recurrent_layers_keep_no_composed_weight():
    model = get_peft_model(
        Regression(Recurrent()), ChildTuningConfig(variant="random", init_weights=False, target_modules=["lstm"])
    )
    batch = {"x": torch.randn(2, 3, 6), "labels": torch.randn(2, 3, 6)}
    result = logits(model, batch)
    lstm = model.base_model.model.body.lstm.base_layer
    assert all(flat is own for flat, own in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    model(**batch).loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "child_delta" in key)
    assert torch.equal(logits(model.merge_and_unload(), batch), result)


def test_no_copy_is_kept_of_a_weight_that_a_parent_reads():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre, self.read = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return nn.functional.linear(self.pre(x), self.read.weight)

    model = get_peft_model(
        Regression(Reader()), ChildTuningConfig(variant="random", init_weights=False, target_modules=["pre", "read"])
    )
    x = torch.randn(2, 64)
    own = [*model.parameters(), *model.buffers()]
    kept, output = saved_bytes(lambda: model(x, torch.zeros(2, 64)), own)
    assert kept < 64 * 64 * 4
    output.loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "child_delta" in key)


class Method(nn.Module):
    """A module that is used by a method other than forward."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 6))

        def encode(self, x):
            return x @ self.table

    def __init__(self):
        super().__init__()
        self.inner = Method.Table()

    def forward(self, x):
        return self.inner.encode(x)


def test_other_methods_see_the_composed_weights_too():
    config = ChildTuningConfig(variant="random", init_weights=False, target_modules=["inner"])
    model = get_peft_model(Regression(Method()), config)
    batch = {"x": torch.randn(2, 6), "labels": torch.randn(2, 6)}
    result = logits(model, batch)
    model(**batch).loss.backward()
    assert next(value for key, value in model.named_parameters() if "child_delta" in key).grad is not None
    with model.disable_adapter():
        assert not torch.equal(logits(model, batch), result)
    assert torch.equal(logits(model.merge_and_unload(), batch), result)


def test_modules_under_two_names():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    for name in ("first", "second"):
        base = Regression(Aliased())
        config = ChildTuningConfig(variant="random", init_weights=False, target_modules=[name])
        model = get_peft_model(base, config)
        body = model.base_model.model.body
        assert body.first is body.second
        batch = {"x": torch.randn(2, 6), "labels": torch.randn(2, 6)}
        result = logits(model, batch)
        merged = model.merge_and_unload()
        assert type(merged.body.first) is nn.Linear
        assert merged.body.first is merged.body.second
        assert torch.equal(logits(merged, batch), result)


def tiny_vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


def test_an_adapter_saved_beside_one_that_wraps_more_loads_everywhere(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, ChildTuningConfig(variant="random", target_parameters=["cls_token"]), adapter_name="a"
    )
    inner = ChildTuningConfig(variant="random", init_weights=False, target_modules=["projection"])
    model.add_adapter("b", inner)
    model.set_adapter("b")
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    expected = logits(model, pixels)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    for load in (PeftModel.from_pretrained, lambda base, folder: base.load_adapter(folder) and base):
        fresh = ViTForImageClassification.from_pretrained(tmp_path / "base")
        loaded = load(fresh, tmp_path / "b")
        assert torch.equal(logits(loaded, pixels), expected)


def test_a_module_that_checkpoints_inside_itself_is_refused():
    class Checkpointing(nn.Module):
        gradient_checkpointing = True

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    config = ChildTuningConfig(variant="random", density=0.5, target_parameters=["scale"])
    model = get_peft_model(Regression(Checkpointing()), config).train()
    with pytest.raises(RuntimeError, match="A Checkpointing checkpoints its own activations"):
        model(torch.randn(2, 6), torch.randn(2, 6))
    logits(model, {"x": torch.randn(2, 6), "labels": torch.randn(2, 6)})


def test_data_parallel_replicas_are_refused():
    model = chosen_model("linear")
    layer = next(iter(child_tuning_layers(model).values()))
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"does not work in nn\.DataParallel"):
        replica(torch.randn(2, 6))


def test_a_file_without_a_child_network_is_refused(tmp_path):
    chosen_model("llama").save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = build("llama")
    with pytest.raises(FormatError, match="The file holds no child network"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not child_tuning_layers(base)


def test_autocast_and_inference_mode():
    model = chosen_model("bert")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**bert_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**bert_batch()).loss
    loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "child_delta" in key)


@pytest.mark.parametrize("granularity", ["entry", "input_channel"])
@pytest.mark.parametrize("kind", [nn.Linear, lambda wide, narrow: Conv1D(narrow, wide)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_linear_layer_under_autocast(kind, granularity, dtype):
    config = {"density": 0.2, "target_parameters": ["0.weight"], "granularity": granularity}
    base = nn.Sequential(kind(24, 40)).to(dtype)
    model = get_peft_model(base, ChildTuningConfig(**config, variant="random", init_weights=False))
    ((_, layer),) = child_tuning_layers(model).items()
    ((_, delta),) = layer.deltas_of("weight")
    x = torch.randn(6, 24, dtype=dtype, requires_grad=True)
    own = [x, delta, *model.parameters(), *model.buffers()]
    with torch.autocast("cpu", torch.bfloat16):
        kept, found = saved_bytes(lambda: model(x), own)
        weight, bias = layer._composition("weight").tensor(), layer.base_layer.bias  # cast as a whole, in each product
        expected = F.linear(x, weight, bias) if kind is nn.Linear else torch.addmm(bias, x, weight)
    assert torch.equal(found, expected)
    assert kept <= 2 * x.numel()  # the input in bfloat16, and no weight
    upstream = torch.randn_like(found)
    of_x, of_delta = torch.autograd.grad(found, [x, delta], upstream)
    twin_of_x, twin_of_delta = torch.autograd.grad(expected, [x, delta], upstream)
    assert torch.equal(of_x, twin_of_x)
    if granularity == "entry":
        assert torch.equal(of_delta, twin_of_delta)
    torch.testing.assert_close(of_delta, twin_of_delta, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("granularity", ["entry", "input_channel"])
def test_hooks_see_the_weight_as_it_is(granularity):
    config = {"density": 0.5, "target_parameters": ["0.weight"], "granularity": granularity}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), ChildTuningConfig(**config, variant="random"))
    seen = []
    layer = child_tuning_layers(model)["base_model.model.0"].base_layer
    layer.register_forward_hook(lambda module, args, output: seen.append(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 8))
    assert seen == [torch.float32]


def test_what_is_exported_under_autocast_runs_outside_of_it():
    config = {"density": 0.5, "target_parameters": ["0.weight"], "variant": "random", "init_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), ChildTuningConfig(**config)).eval()
    x = torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))


def test_a_forward_of_the_instance_is_run_with_the_weight_as_it_is():
    base = nn.Sequential(nn.Linear(8, 8))
    seen = []

    def forward(x):
        seen.append(base[0].base_layer.weight.dtype)
        return x * seen[0].itemsize

    base[0].forward = forward
    config = {"density": 0.5, "target_parameters": ["0.weight"], "granularity": "input_channel"}
    model = get_peft_model(base, ChildTuningConfig(**config, variant="random", init_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(torch.ones(2, 8))
    assert seen == [torch.float32]
    assert torch.equal(result, torch.full((2, 8), 4.0))


def test_attention_with_keys_of_another_width():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, x, key, value):
            return self.attention(x, key, value)[0]

    model = Attending().eval()
    config = ChildTuningConfig(variant="random", density=0.5, init_weights=False, target_modules=["attention"])
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    with torch.no_grad():
        before = model(*inputs)
        adapted = get_peft_model(model, config).eval()
        composed = adapted(*inputs)
        assert not torch.equal(composed, before)
        assert torch.equal(adapted.merge_and_unload()(*inputs), composed)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's own, of Conv1D
@pytest.mark.parametrize("name", ["llama", "gpt2_tied"])
def test_conversion_to_lora_loses_the_less_the_higher_the_rank(name, tmp_path, granularity):
    targets = {"llama": {"target_modules": ["q_proj", "down_proj"]}, "gpt2_tied": {"target_modules": ["c_fc"]}}[name]
    model = chosen_model(name, variant="random", init_weights=False, **targets)
    for layer in child_tuning_layers(model).values():  # LoRA has no bias
        for key, own in layer.targets_of("default").items():
            if key == "bias" and own in layer.named_deltas("default"):
                layer.named_deltas("default")[own].zero_()
    batch = batch_of(name)
    expected, errors = logits(model, batch), []
    for rank in (2, 8, 16):
        save_as_lora(tmp_path / str(rank), model, rank=rank)
        found = logits(PeftModel.from_pretrained(build(name), tmp_path / str(rank)), batch)
        errors.append(float((found - expected).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5  # no weight has a higher rank


def test_conversion_to_lora_says_what_it_leaves_out():
    model = chosen_model("bert", variant="random", density=1.0, target_modules=["query"], init_weights=False)
    with pytest.warns(UserWarning, match="LoRA cannot express the change of .*query.bias', which is left out"):
        convert_to_lora(model, rank=4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(chosen_model("llama_embedding", variant="random"), rank=4)
