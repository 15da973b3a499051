"""Folders that hold more than one model's files, outputs that are inputs, and weights that no file can express."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_child import ChildTuningConfig, select_child_network
from peft_child.files.adapter_folder import CONFIG_NAME, open_adapter, write_adapter
from peft_child.files.checkpoint import INDEX_NAME, Checkpoint
from peft_child.files.extract import extract_adapter
from peft_child.files.merge import check_fits
from peft_child.tensors.delta import ChildSize

from ..helpers import assert_same, chosen_model, move
from ..problems import batch_of, build
from .test_main import content, error_of, output_of


@pytest.fixture
def base(tmp_path):
    """A tiny Llama in one file."""
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base, tmp_path):
    """The same after some training."""
    shutil.copytree(base, tmp_path / "tuned")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][:2] += 1
    save_file(tensors, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "tuned"


@pytest.fixture
def child(base, tuned, tmp_path):
    """The difference between the two."""
    output_of("extract", base, tuned, tmp_path / "child")
    return tmp_path / "child"


def add_old_shards(folder):
    """What an earlier, sharded save has left behind: other weights, and an index of them."""
    old = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_file_that_transformers_loads_is_merged_into(base, tuned, child, tmp_path):
    add_old_shards(base)
    output_of("merge", child, base, tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), weights(tuned))


def test_the_file_that_transformers_loads_is_extracted_from(base, tuned, child, tmp_path):
    add_old_shards(tuned)
    output_of("extract", base, tuned, tmp_path / "again")
    assert content(tmp_path / "again") == content(child)


def test_the_file_that_the_configuration_names_is_merged_into(base, tuned, child, tmp_path):
    shutil.move(base / "model.safetensors", base / "named.safetensors")
    old = {name: tensor + 1 for name, tensor in load_file(base / "named.safetensors").items()}
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "transformers_weights": "named.safetensors"}))
    output_of("merge", child, base, tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), weights(tuned))


def test_an_index_can_be_named_itself(base, tuned, child, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    output_of("merge", child, tmp_path / "shards" / INDEX_NAME, tmp_path / "merged")
    shutil.copy(base / "config.json", tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), weights(tuned))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors"])
def test_weights_that_transformers_would_not_load_as_safetensors_are_refused_by_name(base, child, tmp_path, name):
    shutil.move(base / "model.safetensors", base / name)
    assert f"It has '{name}': pass the path of a safetensors file itself" in error_of(
        "merge", child, base, tmp_path / "merged"
    )


@pytest.mark.parametrize("config", ["[]", '{"architectures": "LlamaForCausalLM"}', '{"architectures": [1]}'])
def test_a_strange_configuration_beside_the_weights_is_no_obstacle(base, tuned, tmp_path, config):
    (base / "config.json").write_text(config)
    output_of("extract", base, tuned, tmp_path / "child")


def test_merging_copies_what_describes_the_model_and_no_other_weights(base, child, tmp_path):
    add_old_shards(base)
    described = ["tokenizer.json", "chat_template.jinja", "modeling_own.py", "LICENSE", "merges.txt", "spiece.model"]
    described += ["tokenizer.model.v3", "prophetnet.tokenizer"]
    foreign = ["adapter_config.json", "pytorch_model.bin", "m.gguf", "consolidated.00.pth", "optimizer.pt", "m.onnx"]
    foreign += ["adapter_fusion.json", "model.safetensors.index.fp16.json", "model.fp16.safetensors"]
    for name in [*described, *foreign]:
        (base / name).write_text("{}")
    for name in ("onnx/model.onnx", "onnx/config.json", "original/params.json", "original/consolidated.pth"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool.jinja").write_text("{}")
    output_of("merge", child, base, tmp_path / "merged")
    found = {str(path) for path in content(tmp_path / "merged")}
    kept = {*described, "additional_chat_templates/tool.jinja"}
    assert found == kept | {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("options", [(), ("--density", 0.01)], ids=["lossless", "density"])
@pytest.mark.parametrize("broken", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_extraction_of_changes_that_are_not_finite_is_refused_and_leaves_nothing(
    base, tuned, tmp_path, value, broken, options
):
    file = tmp_path / broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    error = error_of("extract", base, tuned, tmp_path / "child", *options)
    assert "3 values of 'model.norm.weight' are not" in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


@pytest.mark.parametrize("options", [(), ("--density", 0.0001)], ids=["lossless", "density"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_but_did_not_change_are_left_alone(base, tuned, tmp_path, value, options):
    for folder in (base, tuned):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    output_of("extract", base, tuned, tmp_path / "child", *options)
    output_of("verify", tmp_path / "child")


def test_an_adapter_that_diverged_is_not_saved(tmp_path):
    model = chosen_model("llama")
    move(model)
    with torch.no_grad():
        delta = next(p for name, p in model.named_parameters() if ".child_delta." in name)
        delta[0] = float("nan")
    with pytest.raises(ValueError, match=r"Deltas must be finite to be saved; 1 values of '[\w.]+' are not"):
        model.save_pretrained(tmp_path / "child")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("is_combined", [False, True])
def test_extracted_and_combined_adapters_load_in_auto_classes(base, child, tuned, tmp_path, is_combined):
    if is_combined:
        output_of("combine", tmp_path / "both", child, child, "--weight", 0.5, "--weight", 0.5)
        child = tmp_path / "both"
    model = AutoPeftModelForCausalLM.from_pretrained(child)
    assert_same(model.merge_and_unload().state_dict(), weights(tuned))


def test_adapters_below_a_folder_are_pointed_to(child):
    folder = child.parent / "run"
    shutil.move(child, folder / "first")
    assert "pass --subfolder first" in error_of("inspect", folder)
    assert f"or name '{folder / 'first'}'" in error_of("combine", folder.parent / "new", folder)  # has no such option


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_a_head_that_only_one_checkpoint_has_is_explained(tmp_path, embedding, head):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file({embedding: torch.ones(5, 2)}, first)
    save_file({embedding: torch.ones(5, 2), head: torch.ones(5, 2)}, second)
    for files in ((first, second), (second, first)):
        assert "tied to the embeddings is saved only once" in error_of("extract", *files, tmp_path / "child")
    positions = "embeddings.position_embeddings.weight"  # as large as the pooler
    save_file({embedding: torch.ones(5, 2), positions: torch.ones(2, 2)}, first)
    save_file({embedding: torch.ones(5, 2), positions: torch.ones(2, 2), "pooler.weight": torch.ones(2, 2)}, second)
    assert "tied" not in error_of("extract", first, second, tmp_path / "child")


@pytest.mark.parametrize("prefixed", [0, 1])
def test_names_that_differ_by_a_prefix_are_explained(tmp_path, prefixed):
    files = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    tensors = {"embeddings.weight": torch.ones(5, 2), "layer.weight": torch.ones(2, 2)}
    save_file(tensors, files[1 - prefixed])
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, files[prefixed])
    message = error_of("extract", *files, tmp_path / "child")
    assert message.rstrip().endswith("Their names differ by a prefix: save both as models of one class.")


def test_checkpoints_of_two_dtypes_are_explained(tmp_path):
    files = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for file, dtype in zip(files, (torch.bfloat16, torch.float32), strict=True):
        save_file({"layer.weight": torch.ones(2, 2, dtype=dtype)}, file)
    message = error_of("extract", *files, tmp_path / "child")
    assert message.rstrip().endswith("Load one of them in the dtype of the other, and save it.")


def test_fresh_adapters_are_checked_against_a_base_too(base, tuned, tmp_path):
    fresh = extract_adapter(Checkpoint(base), Checkpoint(tuned))
    check_fits(fresh, Checkpoint(base))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has 3 entries"):
        check_fits(fresh, Checkpoint(tmp_path / "other.safetensors"))


def test_a_configuration_from_a_file_does_not_stand_for_a_choice(tmp_path):
    chosen_model("llama").save_pretrained(tmp_path / "first")
    config = ChildTuningConfig.from_pretrained(tmp_path / "first")
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="was neither chosen nor loaded"):
        model.save_pretrained(tmp_path / "second")
    select_child_network(model, [batch_of("llama")], progress_bar=False)
    model.save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(build("llama"), tmp_path / "second")


def test_a_configuration_from_a_file_makes_a_new_adapter_that_can_be_saved(tmp_path):
    chosen_model("llama", variant="random").save_pretrained(tmp_path / "first")
    config = ChildTuningConfig.from_pretrained(tmp_path / "first")
    model = get_peft_model(build("llama"), config)
    move(model)
    model.save_pretrained(tmp_path / "second")
    write_adapter(tmp_path / "third", open_adapter(tmp_path / "second"))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "second")
    written = json.loads((tmp_path / "second" / CONFIG_NAME).read_text())["child_sizes"]
    assert loaded.peft_config["default"].child_sizes == {name: ChildSize(*size) for name, size in written.items()}
