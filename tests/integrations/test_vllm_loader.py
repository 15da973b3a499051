"""A base model loaded by vLLM with a child network: the weights of the merged checkpoint, without one."""

import pytest
import torch

from peft_child.files.adapter_folder import open_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import Patch, TensorPatch, export_patch, write_patch

from .engines import (
    SWAPPING,
    UNPACKED,
    answers,
    answers_of_transformers,
    digests,
    engine,
    save_child,
    save_experts,
    save_llama,
    vllm,
)


from peft_child.integrations.vllm import swap_child_network  # isort: skip  # needs vLLM

# Engines take seconds each; and the warnings are those of vLLM about other packages.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LOADING = {"load_format": "peft_child"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_weights_and_answers_are_those_of_the_merged_checkpoint(tmp_path, tied, channels):
    base = save_llama(tmp_path / "base", tied=tied)
    child = save_child(tmp_path / "child", base, channels=channels)
    merge_checkpoint(open_adapter(child), Checkpoint(base), tmp_path / "merged")
    with engine(tmp_path / "merged") as llm:
        expected, weights = answers(llm), digests(llm)
    with engine(base) as llm:
        assert answers(llm)[0] != expected[0]
    with engine(base, **LOADING, model_loader_extra_config={"adapter": str(child)}) as llm:
        assert digests(llm) == weights
        tokens, logarithms = answers(llm)
    assert (tokens, logarithms) == expected
    for ours, (theirs, largest) in zip(logarithms, answers_of_transformers(tmp_path / "merged", tokens), strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=0.05)  # bfloat16, other kernels
        torch.testing.assert_close(theirs, largest, rtol=0, atol=0.05)


def test_experts(tmp_path):
    base = save_experts(tmp_path / "base")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in Checkpoint(base).places
    child = save_child(tmp_path / "child", base)
    merge_checkpoint(open_adapter(child), Checkpoint(base), tmp_path / "merged")
    with engine(tmp_path / "merged") as llm:
        expected = digests(llm)
    with engine(base, **LOADING, model_loader_extra_config={"adapter": str(child)}) as llm:
        assert digests(llm) == expected


def test_what_is_refused(tmp_path):
    base, other = save_llama(tmp_path / "base"), save_llama(tmp_path / "other", seed=7)
    child = save_child(tmp_path / "child", base)
    experts = save_child(tmp_path / "experts-child", save_experts(tmp_path / "experts"))
    for model, extra, problem in [
        (base, {}, "load_format='peft_child' needs model_loader_extra_config"),
        (base, {"adapter": str(child), "adaptor": 1}, "Unexpected extra config keys"),
        (base, {"adapter": str(tmp_path / "none")}, "There is no file or folder"),
        (base, {"adapter": str(tmp_path), "subfolder": "x"}, "is not an adapter folder"),
        (base, {"adapter": str(experts)}, "has no tensor 'model.layers.0.mlp"),
        (other, {"adapter": str(child)}, "are not those that the adapter was made on"),
    ]:
        with (
            pytest.raises((ValueError, OSError), match=problem),
            engine(model, **LOADING, model_loader_extra_config=extra),
        ):
            pass


def test_two_workers_share_the_tensors(tmp_path, monkeypatch):
    """Tensor parallelism: each worker takes its part of every changed tensor."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    base = save_llama(tmp_path / "base")
    child = save_child(tmp_path / "child", base)
    merge_checkpoint(open_adapter(child), Checkpoint(base), tmp_path / "merged")
    found = []
    for model, options in [
        (tmp_path / "merged", {}),
        (base, {**LOADING, "model_loader_extra_config": {"adapter": str(child)}}),
    ]:
        with engine(model, tensor_parallel_size=2, distributed_executor_backend="mp", **options) as llm:
            found.append((answers(llm), llm.collective_rpc("compute_weight_checksums")))
    assert found[0] == found[1]
    assert len(found[0][1]) == 2


def test_a_patch_file(tmp_path):
    base = save_llama(tmp_path / "base")
    child, patch = save_child(tmp_path / "child", base), tmp_path / "patch.safetensors"
    export_patch(open_adapter(child), Checkpoint(base), patch)
    found = []
    for adapter in (child, patch):
        with engine(base, **LOADING, model_loader_extra_config={"adapter": str(adapter)}) as llm:
            found.append(digests(llm))
    assert found[0] == found[1]
    part = TensorPatch((2,), torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16))
    write_patch(tmp_path / "wrong.safetensors", Patch({"model.layers.7.nothing.weight": part}))
    extra = {"adapter": str(tmp_path / "wrong.safetensors")}
    problem = r"changes 'model\.layers\.7\.nothing\.weight', which .* does not have"
    with pytest.raises(ValueError, match=problem), engine(base, **LOADING, model_loader_extra_config=extra):
        pass


def test_what_was_loaded_can_be_swapped(tmp_path):
    base = save_llama(tmp_path / "base")
    children = [save_child(tmp_path / f"{number}", base, seed=number, channels=number == 1) for number in range(2)]
    extra = {"model_loader_extra_config": {"adapter": str(children[0])}}
    with engine(base, **UNPACKED) as llm:
        expected = digests(llm)
    with engine(base, **SWAPPING, **LOADING, **extra) as llm:
        first = digests(llm)
        assert first != expected
        children[0].rename(tmp_path / "moved")  # what it was is known
        swap_child_network(llm, None)
        assert digests(llm) == expected
        swap_child_network(llm, children[1])
        swap_child_network(llm, tmp_path / "moved")
        assert digests(llm) == first


def test_the_format_is_registered_by_the_entry_point():
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with pytest.raises(ValueError, match="needs model_loader_extra_config"):
        get_model_loader(vllm.config.LoadConfig(load_format="peft_child"))
