"""The life of an adapter in PEFT and transformers, with their own calls."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_child import (
    ChildTuningConfig,
    ChildTuningLayer,
    FormatError,
    select_child_network,
)
from peft_child.layers.layer import child_tuning_layers

from ..helpers import assert_same, child_of, chosen_model, config_for, logits, move, snapshot, train
from ..problems import PROBLEMS, batch_of, build, tiny_bert


pytestmark = pytest.mark.usefixtures("granularity")


def trained(name, base=None, **changes):
    model = chosen_model(name, base, **changes)
    train(model.train(), [batch_of(name), batch_of(name, 2)])
    return model.eval()


# Loading


@pytest.fixture
def llama_folders(tmp_path):
    """A base model on disk, and an adapter of it, with the logits that it gives."""
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained("llama", base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "child")
    return tmp_path / "base", tmp_path / "child", logits(model, batch_of("llama"))


LOADERS = {
    "PeftModel": lambda base, child: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), child),
    "PeftModel low_cpu_mem_usage": lambda base, child: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), child, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda base, child: AutoPeftModelForCausalLM.from_pretrained(child),
    "transformers load_adapter": lambda base, child: load_natively(AutoModelForCausalLM.from_pretrained(base), child),
    "transformers AutoModel": lambda base, child: AutoModelForCausalLM.from_pretrained(child),
    "PeftModel load_adapter": lambda base, child: load_second(base, child),
}


def load_natively(model, child):
    model.load_adapter(child)
    return model


def load_second(base, child):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config_for("llama", variant="random"))
    model.load_adapter(child, adapter_name="second")
    model.set_adapter("second")
    return model


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_same_logits(llama_folders, loader):
    base, child, expected = llama_folders
    assert torch.equal(logits(LOADERS[loader](base, child), batch_of("llama")), expected)


def test_loading_for_inference_and_for_more_training(llama_folders):
    base, child, _ = llama_folders
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), child)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), child, is_trainable=True)
    before = child_of(model)
    train(model.train(), [batch_of("llama")])
    assert_same(child_of(model), before)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", PROBLEMS)
def test_save_and_load_is_exact_and_holds_nothing_else(name, tmp_path):
    model = trained(name)
    expected = logits(model, batch_of(name))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert not [
        key for key in keys if "child_delta" not in key and "child_index" not in key and "classifier" not in key
    ]
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(loaded, batch_of(name)), expected)
    assert torch.equal(logits(loaded.merge_and_unload(), batch_of(name)), expected)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = trained("bert")
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "a", is_trainable=True)
    loaded.save_pretrained(tmp_path / "c")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "c/adapter_model.safetensors"
    ).read_bytes()


def test_saving_a_selected_adapter_of_several(tmp_path):
    model = trained("llama")
    model.add_adapter("second", config_for("llama", variant="random", init_weights=False))
    model.set_adapter("second")
    expected = logits(model, batch_of("llama"))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "second")
    assert torch.equal(logits(loaded, batch_of("llama")), expected)


def test_a_file_loads_where_another_adapter_wraps_more(tmp_path):
    inner = get_peft_model(build("attention"), config_for("attention_output", variant="random", init_weights=False))
    expected = logits(inner, batch_of("attention"))
    inner.save_pretrained(tmp_path)
    outer = get_peft_model(build("attention"), config_for("attention", variant="random"))
    outer.load_adapter(tmp_path, adapter_name="inner")
    outer.set_adapter("inner")
    assert torch.equal(logits(outer, batch_of("attention")), expected)


def test_a_file_loads_without_sizes_in_the_configuration(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["child_sizes"] = None
    path.write_text(json.dumps(settings))
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(loaded, batch_of("bert")), logits(model, batch_of("bert")))


def test_an_adapter_for_another_base_is_refused_and_changes_nothing(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"does not fit the base model: its 'model\.layers.*has 384 entries, .*768"):
        PeftModel.from_pretrained(other, tmp_path)
    assert_same(snapshot(other), before)
    with pytest.raises(ValueError, match=r"does not fit the base model.*no such target"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def damaged(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors, kind):
    return next(key for key in sorted(tensors) if kind in key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[first(t, "child_index")][40:41].add_(1), "The child of 'model.layers.0.*checksum"),
        (lambda t: t.pop(first(t, "child_index")), "without the other: child_index is missing"),
        (lambda t: t.pop(first(t, "child_delta")), "without the other: child_delta is missing"),
        (lambda t: t.update({first(t, "child_delta"): torch.zeros(3)}), "positions and its delta 3 values"),
        (lambda t: t.update({first(t, "child_delta"): torch.zeros(3, 1)}), "1-D floating point delta"),
        (lambda t: t.update({first(t, "child_index"): torch.zeros(40)}), "1-D uint8 index block"),
        (lambda t: t[first(t, "child_delta")].add_(1), "The checksum of its delta does not match"),
        (lambda t: t.update({"x.child_delta.weight": torch.zeros(3)}), "child of 'x.weight' without the other"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path, change, message):
    trained("llama").save_pretrained(tmp_path)
    damaged(tmp_path, change)
    model = chosen_model("llama")
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        peft.set_peft_model_state_dict(model, peft.utils.save_and_load.load_peft_weights(tmp_path, device="cpu"))
    assert_same(snapshot(model), before)
    with pytest.raises(FormatError, match=message):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert_same(snapshot(model), before)
    base = build("llama")
    with pytest.raises(FormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert not child_tuning_layers(base)
    assert_same(snapshot(base), snapshot(build("llama")))


@pytest.mark.parametrize("variant", ["task_driven", "random", "task_free"])
def test_a_refused_adapter_is_removed_again(tmp_path, variant):
    trained("llama", variant=variant).save_pretrained(tmp_path)
    base = build("llama", seed=7)
    before = snapshot(base)
    with pytest.raises(ValueError, match="other weights than the one this adapter was made on"):
        PeftModel.from_pretrained(base, tmp_path, check_base="error", is_trainable=True)
    assert_same(snapshot(base), before)
    damaged(tmp_path, lambda tensors: tensors[first(tensors, "child_delta")].add_(1))
    model = get_peft_model(build("llama"), config_for("llama", variant=variant))
    before = snapshot(model)
    with pytest.raises(FormatError, match="checksum"):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    weights = peft.utils.save_and_load.load_peft_weights(tmp_path, device="cpu")
    with pytest.raises(FormatError, match="checksum"):  # an adapter that was there before stays
        peft.set_peft_model_state_dict(model, weights)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_is_recognised_in_any_dtype(tmp_path, dtype):
    trained("llama").save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("llama", dtype=dtype), tmp_path, check_base="error")


def test_other_base_weights_are_noticed(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    assert "check_base" not in (tmp_path / "adapter_config.json").read_text()
    other = build("llama", seed=7)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"other weights than the one .* such as 'model\.layers\.0"):
        PeftModel.from_pretrained(other, tmp_path, check_base="error")
    assert_same(snapshot(other), before)
    PeftModel.from_pretrained(build("llama", seed=7), tmp_path, check_base="off")
    with pytest.warns(UserWarning, match="other weights than the one this adapter was made on"):
        PeftModel.from_pretrained(other, tmp_path)


# Adapters of a model


def test_disable_set_delete_and_unload():
    model = trained("linear")
    batch = batch_of("linear")
    plain = logits(build("linear"), batch)
    result = logits(model, batch)
    model.add_adapter("second", config_for("linear", variant="random", init_weights=False))
    assert torch.equal(logits(model, batch), result)
    model.set_adapter("second")
    second = logits(model, batch)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model, batch), result)
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.child_delta) == ["default"] for layer in child_tuning_layers(model).values())
    model.merge_adapter()
    base = model.unload()
    assert torch.equal(logits(base, batch), plain)
    assert_same(snapshot(base), snapshot(build("linear")))


def test_a_second_adapter_may_target_what_is_inside_the_first_one():
    model = get_peft_model(build("attention"), config_for("attention", variant="random"))
    model.add_adapter("inner", config_for("attention_output", variant="random", init_weights=False))
    model.set_adapter("inner")
    alone = get_peft_model(build("attention"), config_for("attention_output", variant="random"), adapter_name="inner")
    assert child_of(model, "inner").keys() == child_of(alone, "inner").keys()
    assert torch.equal(
        child_of(model, "inner")["body.attention.out_proj.weight"],
        child_of(alone, "inner")["body.attention.out_proj.weight"],
    )
    result = logits(model, batch_of("attention"))
    assert not torch.equal(result, logits(build("attention"), batch_of("attention")))
    assert torch.equal(logits(model.merge_and_unload(), batch_of("attention")), result)


def test_all_linear_for_a_second_adapter():
    model = chosen_model("llama")
    model.add_adapter("second", config_for("llama", variant="random"))
    assert child_of(model, "second").keys() == child_of(chosen_model("llama", variant="random")).keys()


@pytest.mark.parametrize("variant", ["random", "task_free"])
def test_saving_a_model_leaves_its_configuration_as_it_was(tmp_path, variant):
    config = config_for("llama", variant=variant)
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    assert config.child_sizes is None
    config.density, config.seed = 0.4, 3  # another child network, which the sizes of the first would not fit
    other = get_peft_model(build("llama"), config)
    assert_same(child_of(other), child_of(chosen_model("llama", variant=variant, density=0.4, seed=3)))
    logits(other, batch_of("llama"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_deltas_take_half_of_the_space(tmp_path, dtype):
    model = trained("llama", delta_dtype=dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        deltas = {key: file.get_tensor(key) for key in file.keys() if "child_delta" in key}  # noqa: SIM118
    assert {delta.dtype for delta in deltas.values()} == {getattr(torch, dtype)}
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    for key, value in loaded.state_dict().items():
        if "child_delta" in key:
            assert value.dtype == torch.float32
            assert torch.equal(value, model.state_dict()[key].to(getattr(torch, dtype)).float())


@pytest.mark.filterwarnings("ignore")  # torch's own way to quantise is deprecated
@pytest.mark.parametrize("change", ["quantised", "parametrised", "taken out"])
def test_a_parameter_that_is_gone_is_an_error_and_not_left_out(change):
    model = trained("linear")
    layer = next(iter(child_tuning_layers(model).values()))
    if change == "quantised":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)
    elif change == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(layer.base_layer)
    else:
        layer.base_layer.weight = None
    gone = r"'weight' has a child network, but is no parameter of the \w+ any more.*merge_and_unload\(\) before"
    with pytest.raises(RuntimeError, match=gone):
        logits(model, batch_of("linear"))
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=gone):
            method()
    with pytest.raises(RuntimeError, match=gone):
        _ = layer.weight


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_what_is_not_finite_before_it_writes(method):
    base = build("linear")
    before = snapshot(base)
    model = chosen_model("linear", base)
    last = list(child_tuning_layers(model).values())[-1]
    with torch.no_grad():
        next(iter(last.named_deltas("default").values()))[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        getattr(model, method)(safe_merge=True)
    assert_same(snapshot(model.unload()), before)
    fine = trained("linear")
    expected = logits(fine, batch_of("linear"))
    assert torch.equal(logits(fine.merge_and_unload(safe_merge=True), batch_of("linear")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["nothing"]}, r"Target modules .*nothing.* not found"),
        ({"target_parameters": ["nothing.weight"]}, "must each match a parameter.*'nothing.weight' matches none"),
        ({"target_parameters": ".*nothing"}, r"must each match a parameter.*'\.\*nothing' matches none"),
        ({"target_modules": ["body.0"], "target_parameters": ["x"]}, "'x' matches none"),
    ],
)
def test_targets_that_match_nothing(changes, message):
    base = build("linear")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ChildTuningConfig(**changes))
    assert_same(snapshot(base), before)
    assert type(base.body[0]) is nn.Linear


def test_defaults_and_exclusions():
    default = child_of(get_peft_model(build("bert"), ChildTuningConfig(variant="random", density=1.0)))
    assert {key.split(".")[-2] for key in default} == {"query", "value"}
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(build("linear"), ChildTuningConfig())

    def children(**changes):
        config = ChildTuningConfig(variant="random", density=1.0, **changes)
        return set(child_of(get_peft_model(build("bert"), config)))

    inside = children(target_modules=["attention"], exclude_modules=["output"])
    assert {key.split(".attention.")[1] for key in inside} == {
        f"self.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")
    }
    named = children(target_modules=["attention"], target_parameters=["pooler.dense.bias"], layers_to_transform=[1])
    assert "bert.pooler.dense.bias" in named
    assert not [key for key in named if "layer.0" in key]
    whole = children(target_parameters=".*", modules_to_save=["classifier"], exclude_modules=["embeddings"])
    assert not [key for key in whole if "classifier" in key or "embeddings" in key]
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in whole


def test_tied_weights_have_one_delta():
    model = trained("llama_tied_head", task_type="CAUSAL_LM")
    deltas = [key for key in model.state_dict() if "child_delta" in key]
    assert deltas == ["base_model.model.model.embed_tokens.child_delta.default.weight"]
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' is tied between a targeted module and one that is trained densely"
    ):
        get_peft_model(build("llama_tied_head"), config_for("llama_embedding", modules_to_save=["lm_head"]))


def test_a_top_level_parameter_is_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="'scale' belongs to the top-level module"):
        get_peft_model(Root(), ChildTuningConfig(target_parameters=".*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    base = build("linear")
    base.body[2].weight = nn.Parameter(base.body[2].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"'body.2.weight' of a Linear is a Parameter of {dtype}. Quantised weights"):
        get_peft_model(base, config_for("linear"))
    packed = build("linear")
    packed.body[0].register_buffer("qweight", torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"'body.0.qweight' of a Linear is a Tensor of torch.int32"):
        get_peft_model(packed, config_for("linear"))
    assert type(packed.body[0]) is nn.Linear


def test_a_tensor_subclass_that_packs_a_weight_is_refused():
    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner_tensors, metadata, size, stride):
            return Packed(inner_tensors["inner"])

        @classmethod
        def __torch_dispatch__(cls, func, types, args, kwargs=None):
            return torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: Packed(t), func(*(a.inner if type(a) is cls else a for a in args))
            )

    base = build("linear")
    base.body[0].weight = nn.Parameter(Packed(base.body[0].weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=r"'body.0.weight' of a Linear is a Packed of torch.float32. Quantised"):
        get_peft_model(base, config_for("linear"))


def test_what_is_not_supported_says_so():
    model = trained("llama", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"'PEFT_CHILD' is not compatible|PEFT_CHILD"):
        get_peft_model(build("llama"), config_for("llama"), mixed=True)
    with pytest.raises(ValueError, match="must not be the name of a parameter"):
        get_peft_model(build("llama"), config_for("llama"), adapter_name="weight")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("low_rank", LoraConfig())


def test_hotswap_is_refused(llama_folders):
    from peft.utils.hotswap import hotswap_adapter

    base, child, _ = llama_folders
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), child)
    with pytest.raises(ValueError, match=r"LORA"):
        hotswap_adapter(model, str(child), adapter_name="default")


def test_an_offloaded_base_is_refused_with_a_reason():
    from accelerate import cpu_offload

    model = trained("llama")
    cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Parameter 'weight' of a Linear is offloaded"):
        logits(model, batch_of("llama"))
    with pytest.raises(RuntimeError, match="Parameter 'weight' of a Linear is offloaded"):
        model.merge_adapter()
    scored = get_peft_model(build("llama"), config_for("llama"))
    cpu_offload(scored.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="is offloaded"):
        select_child_network(scored, [batch_of("llama")])


def test_copies_and_pickles(tmp_path):
    model = trained("attention")
    batch = batch_of("attention")
    expected = logits(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), expected)
        move(other)
        assert not torch.equal(logits(other, batch), expected)
    assert torch.equal(logits(model, batch), expected)
    tied = copy.deepcopy(trained("llama_tied_head"))
    move(tied)
    assert torch.equal(logits(tied, batch_of("llama")), logits(tied.merge_and_unload(), batch_of("llama")))


def test_status_and_counts(capsys):
    model = chosen_model("bert")
    model.print_trainable_parameters()
    trainable = sum(map(len, child_of(model).values())) + 34
    assert f"trainable params: {trainable:,d} " in capsys.readouterr().out
    status = model.get_model_status()
    assert status.peft_types == {"default": "PEFT_CHILD"}
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.trainable_params == trainable
    assert "ChildTuningLayer" in {layer.module_type for layer in model.get_layer_status()}
    tied = trained("llama_tied_head")
    tied.merge_adapter()
    assert tied.get_model_status().merged_adapters == ["default"]


def test_dtypes_of_the_deltas():
    def dtypes(**options):
        base = build("llama", dtype=torch.bfloat16)
        model = get_peft_model(base, config_for("llama", variant="random"), **options)
        return {value.dtype for key, value in model.named_parameters() if "child_delta" in key}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False) == {torch.bfloat16}


def test_native_transformers_adapters_are_trained_saved_and_loaded(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(config_for("llama"))
    select_child_network(model, [batch_of("llama")], progress_bar=False)
    train(model, [batch_of("llama")])
    expected = logits(model, batch_of("llama"))
    assert not torch.equal(expected, logits(base, batch_of("llama")))
    model.save_pretrained(tmp_path / "child")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(tmp_path / "child")
    assert torch.equal(logits(again, batch_of("llama")), expected)


def test_the_head_is_trained_saved_and_loaded(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = trained("bert", base)
    model.save_pretrained(tmp_path / "child")
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "child"
    )
    assert torch.equal(logits(loaded, batch_of("bert")), logits(model, batch_of("bert")))
    assert not torch.equal(loaded.base_model.model.classifier.weight, base.classifier.original_module.weight)


def test_generation():
    model = trained("llama", task_type="CAUSAL_LM")
    ids = batch_of("llama")["input_ids"]
    generated = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, merged)


def test_a_configuration_whose_file_was_never_loaded_says_so(llama_folders):
    config = PeftConfig.from_pretrained(llama_folders[1])
    config.base_model_name_or_path = None
    model = get_peft_model(build("llama"), config)
    with pytest.raises(FormatError, match="no adapter file was loaded"):
        logits(model, batch_of("llama"))


def test_parents_see_the_base_layer_through_the_wrapper():
    model = chosen_model("llama")
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    assert isinstance(layer, ChildTuningLayer)
    assert (layer.in_features, layer.out_features, layer.bias) == (16, 24, None)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        layer.nothing  # noqa: B018
    assert not hasattr(layer, "_hf_hook")


def test_a_native_adapter_with_layers_in_which_nothing_was_chosen_can_be_saved(tmp_path, granularity):
    model = build("llama")
    config = config_for("llama", target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    named = build("llama").named_parameters()
    shapes = {name: tensor.shape for name, tensor in named if "q_proj" in name or "v_proj" in name}
    first_name = next(iter(shapes))
    scores = {name: torch.rand(shape) + 2 * (name == first_name) for name, shape in shapes.items()}
    if granularity == "input_channel":
        scores = {name: score.sum(0) for name, score in scores.items()}
    adapted.peft_config["default"].density = 0.1
    select_child_network(adapted, scores=scores)
    assert child_of(adapted).keys() == {first_name}
    adapted.save_pretrained(tmp_path / "child")
    native = build("llama")
    native.load_adapter(tmp_path / "child")
    native.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    assert_same(child_of(again), child_of(adapted))
