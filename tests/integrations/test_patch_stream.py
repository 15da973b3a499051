"""What training has changed since an engine was last told."""

import pytest
import torch

from peft_child import keep_largest
from peft_child.files.adapter_tensors import checksum_of
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.patch import Patch, open_patch, write_patch
from peft_child.files.patched import PatchedCheckpoint
from peft_child.integrations.patch_stream import PatchStream

from ..helpers import assert_same, chosen_model, move, settings_of
from ..problems import batch_of, build


def applied(weights, changes):
    for name, patch in changes.items():
        assert torch.equal(patch.indices, patch.indices.unique())
        weights[name].view(-1)[patch.indices.long()] = patch.values
    return weights


@pytest.mark.parametrize("variant", ["task_driven", "random", "channels", "task_free"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_engine_that_takes_all_changes_has_the_merged_weights(variant, dtype):
    base = build("llama")
    engine = {
        name: parameter.detach().to(dtype or torch.float32).clone() for name, parameter in base.named_parameters()
    }
    model = chosen_model("llama", base, **settings_of(variant))
    stream = PatchStream(model, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sizes = []
    for step in range(3):
        if step:
            model(**batch_of("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with stream.changes() as changes:
            sizes.append(sum(len(patch.indices) for patch in changes.values()))
            applied(engine, changes)
        merged = dict(expected(model, dtype).items())
        assert_same(engine, merged)
    assert sizes[0] == 0 < sizes[1]
    with stream.changes() as changes:
        assert changes == {}


def expected(model, dtype):
    """The merged weights; the model is as before afterwards."""
    model.merge_adapter()
    tensors = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach()
        .to(dtype or torch.float32)
        .clone()
        for name, parameter in model.named_parameters()
        if "child_" not in name
    }
    model.unmerge_adapter()
    return tensors


def test_small_changes_wait_until_they_move_a_rounded_value():
    model = chosen_model("llama", build("llama"))
    stream = PatchStream(model, dtype=torch.bfloat16)
    counts = []
    for scale in (0, 1e-6, 0.05):
        move(model, scale=scale)
        with stream.changes() as changes:
            counts.append(sum(len(patch.indices) for patch in changes.values()))
    assert 0 == counts[0] < counts[1] < counts[2]


def test_what_was_not_delivered_is_sent_again():
    model = chosen_model("llama", build("llama"))
    stream = PatchStream(model)
    move(model)
    with pytest.raises(ConnectionError), stream.changes() as lost:
        raise ConnectionError
    with stream.changes() as again:
        assert again.keys() == lost.keys()
        assert all(torch.equal(again[name].values, lost[name].values) for name in lost)
    last = list(model.base_model.model.model.layers)[-1].mlp.down_proj
    move(model)
    last.merge()
    with pytest.raises(ValueError, match="unmerge it before"), stream.changes():
        pass
    last.unmerge()
    with stream.changes() as changes:
        assert changes.keys() == lost.keys()


def test_zeros_with_a_sign():
    base = build("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, parameter, -0.0))
    engine = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = chosen_model("llama", base, variant="random")
    stream = PatchStream(model)
    for _ in range(3):
        with stream.changes() as changes:
            for name, patch in changes.items():
                assert patch.before == checksum_of(engine[name].view(-1)[patch.indices])
            applied(engine, changes)
        assert_same(
            {name: tensor.view(torch.int32) for name, tensor in engine.items()},
            {name: tensor.view(torch.int32) for name, tensor in expected(model, None).items()},
        )
        move(model)


def test_changes_are_sent_as_files_that_fit_only_in_their_order(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    state = PatchedCheckpoint(Checkpoint(tmp_path / "base"))
    model = chosen_model("llama", base)
    stream, files = PatchStream(model), []
    for number in range(3):
        move(model)
        files.append(tmp_path / f"{number}.safetensors")
        with stream.changes() as changes:
            write_patch(files[-1], Patch(changes, {"step": number}))
    with pytest.raises(ValueError, match="was made to replace other values"):
        state.to(open_patch(files[1]))
    for file in files:
        state.changed = state.to(open_patch(file)).changed
    for name, tensor in expected(model, None).items():
        if name in state.base.places:
            assert torch.equal(state.values_at(name, torch.arange(tensor.numel(), dtype=torch.int32)), tensor.view(-1))


def test_what_cannot_be_sent():
    with pytest.raises(ValueError, match="has no Child-Tuning adapter 'other'"):
        PatchStream(chosen_model("llama", build("llama")), adapter_name="other")
    model = chosen_model("llama", build("llama"))
    stream = PatchStream(model)
    move(model)
    with stream.changes():
        pass
    keep_largest(model, 0.01)
    with (
        pytest.raises(ValueError, match=r"Take the old one out of the engine .* make a new PatchStream"),
        stream.changes(),
    ):
        pass
    with pytest.raises(ValueError, match="Modules saved whole are not sent, and this adapter has some: lm_head"):
        PatchStream(chosen_model("llama", build("llama"), modules_to_save=["lm_head"], target_modules=["q_proj"]))
