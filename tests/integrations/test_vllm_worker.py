"""What one worker of vLLM does in a weight update, and when it fails."""

import pytest
import torch

from peft_child.files.adapter_folder import open_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.patch import Patch, TensorPatch, export_patch, write_patch

from .engines import SWAPPING, digests, engine, save_child, save_llama


from peft_child.integrations.vllm import SwapError, cancel_swap, swap_child_network  # isort: skip  # needs vLLM
from peft_child.integrations import vllm_placement, vllm_worker  # isort: skip

# Engines take seconds each; and the warnings are those of vLLM about other packages.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    base = save_llama(folder / "base")
    save_child(folder / "0", base)
    save_child(folder / "1", base, seed=5, channels=True)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder / "base", **SWAPPING) as llm:
        yield llm


@pytest.fixture(autouse=True)
def base(llm):
    """Checksums of the base's weights, with which every test begins and ends."""
    before = digests(llm)
    yield before
    swap_child_network(llm, None)
    assert digests(llm) == before


def test_a_failure_in_the_middle_is_reported_and_undone_by_the_next_swap(folder, llm, base, monkeypatch):
    swap_child_network(llm, folder / "0")
    whole = digests(llm)

    def write(placement, indices, values):
        written.append(len(indices))
        if len(written) == 9:
            raise MemoryError("no room")
        original(placement, indices, values)

    original = vllm_placement.Placement.write
    monkeypatch.setattr(vllm_placement.Placement, "write", write)
    for _ in range(2):
        written = []
        with pytest.raises(SwapError, match=r"^Writing failed, and the engine stays paused.*no room") as failed:
            swap_child_network(llm, folder / "1")
        assert f"held '{folder / '0'}' before, and now parts of it and of what was to come" in str(failed.value)
        assert llm.llm_engine.is_sleeping()
        assert digests(llm) not in (base, whole)
    write_patch(folder / "any.safetensors", Patch({}))
    with pytest.raises(SwapError, match="swap to an adapter or the base first"):
        swap_child_network(llm, folder / "any.safetensors")
    with pytest.raises(SwapError, match=r"Nothing was written, and the engine is still paused\. There is no file"):
        swap_child_network(llm, folder / "misspelt")
    assert llm.llm_engine.is_sleeping()
    monkeypatch.undo()
    swap_child_network(llm, folder / "0")
    assert digests(llm) == whole
    assert not llm.llm_engine.is_sleeping()


def test_an_interruption_in_the_middle_is_undone_by_the_next_swap(folder, llm, base, monkeypatch):
    def interrupt(placement, indices, values):
        original(placement, indices, values)
        raise KeyboardInterrupt

    original = vllm_placement.Placement.write
    monkeypatch.setattr(vllm_placement.Placement, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        swap_child_network(llm, folder / "0")
    monkeypatch.undo()
    assert llm.llm_engine.is_sleeping()
    assert digests(llm) != base
    swap_child_network(llm, None)
    assert digests(llm) == base


def test_an_update_whose_client_is_gone(folder, llm, base):
    llm.start_weight_update()
    with pytest.raises(SwapError, match="already active"):
        swap_child_network(llm, folder / "0")
    assert not llm.llm_engine.is_sleeping()
    cancel_swap(llm)
    swap_child_network(llm, folder / "0")


def test_the_way_back_to_the_base_is_open_if_others_have_written_the_weights(folder, llm, base):
    swap_child_network(llm, folder / "0")
    llm.collective_rpc("reload_weights")
    assert digests(llm) == base
    with pytest.raises(SwapError, match="does not hold"):
        swap_child_network(llm, folder / "1")
    swap_child_network(llm, None)
    assert digests(llm) == base
    swap_child_network(llm, folder / "1")


def test_patches_are_applied_one_after_the_other(folder, llm, base, tmp_path):
    files = [tmp_path / name for name in ("patch.safetensors", "undo.safetensors")]
    export_patch(open_adapter(folder / "1"), Checkpoint(folder / "base"), files[0], undo=files[1])
    swap_child_network(llm, folder / "1")
    expected = digests(llm)
    swap_child_network(llm, None)
    swap_child_network(llm, files[0])
    assert digests(llm) == expected
    with pytest.raises(SwapError, match="was made to replace other values"):
        swap_child_network(llm, files[0])
    swap_child_network(llm, files[1])
    assert digests(llm) == base


def test_hostile_patches_are_refused(folder, llm, base, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = Checkpoint(folder / "base").places[name].shape
    good = TensorPatch(shape, torch.tensor([3], dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16))
    for number, (tensors, problem) in enumerate(
        [
            ({"model.layers.9.mlp.weight": good}, "does not have"),
            ({name: good._replace(shape=(*shape[::-1], 1))}, "export the patch for this checkpoint"),
            ({name: good._replace(values=torch.ones(1))}, "export the patch for this checkpoint"),
            ({name: good._replace(before=1)}, "was made to replace other values"),
            ({name: good._replace(indices=torch.tensor([1 << 40]))}, "increasing, between 0 and"),
        ]
    ):
        write_patch(tmp_path / f"{number}.safetensors", Patch(tensors))
        with pytest.raises(SwapError, match=problem):
            swap_child_network(llm, tmp_path / f"{number}.safetensors")
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    with pytest.raises(SwapError, match="cannot be read"):
        swap_child_network(llm, tmp_path / "rubbish.safetensors")
    assert digests(llm) == base
    write_patch(tmp_path / "good.safetensors", Patch({name: good}))
    swap_child_network(llm, tmp_path / "good.safetensors")
    assert [key.split(":")[-1] for key, digest in digests(llm).items() if digest != base[key]] == [
        "model.layers.0.self_attn.qkv_proj.weight"
    ]


def test_weights_that_others_changed_are_noticed(folder, llm, base):
    (model,) = llm.collective_rpc(lambda worker: worker.model_runner.get_model())
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.neg_()
    with pytest.raises(
        SwapError, match=r"does not hold 'model\.layers\.0\.mlp\.down_proj\.weight' as its checkpoint has it"
    ):
        swap_child_network(llm, folder / "0")
    weight.neg_()
    assert digests(llm) == base


def test_engines_that_change_their_weights_are_refused():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    vllm_worker.check_layout(None, layer)
    layer[0].cpu_linear = torch.nn.functional.linear
    vllm_worker.check_layout(None, layer)
    with pytest.raises(ValueError, match=r"quantises its weights \(fp8\); load adapters with the engine instead"):
        vllm_worker.check_layout("fp8", layer)
    packed = layer[0].weight.clone()
    layer[0].cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, packed, bias)
    with pytest.raises(
        ValueError, match=r"has packed '0\.weight' for this CPU; load adapters .* worker_extension_cls="
    ):
        vllm_worker.check_layout(None, layer)


def test_an_update_takes_one_adapter(folder, llm):
    llm.start_weight_update()
    llm.update_weights({"update_info": {"adapter": str(folder / "0")}})
    with pytest.raises(RuntimeError, match="An update takes one adapter or patch"):
        llm.update_weights({"update_info": {"adapter": str(folder / "1")}})
    llm.start_weight_update()  # the update has ended
    with pytest.raises(RuntimeError, match="The update was cancelled"):
        llm.update_weights({"update_info": {"cancel": True}})
    llm.init_weight_transfer_engine({"init_info": {}})
    llm.start_weight_update()
    llm.finish_weight_update()  # without an update: nothing is written
    llm.shutdown_weight_transfer_engine()
