"""Index blocks are read once, and again only when something else was written into them."""

import torch
from peft import PeftModel

from peft_child.layers import buffers
from peft_child.tensors.codec import decode_index

from ..helpers import child_of, chosen_model, logits, move
from ..problems import batch_of, build


def test_an_index_that_was_loaded_is_decoded_once(tmp_path, monkeypatch):
    model = chosen_model("linear")
    move(model)
    model.save_pretrained(tmp_path)
    decoded = []
    monkeypatch.setattr(buffers, "decode_index", lambda block: decoded.append(block) or decode_index(block))
    model.load_adapter(tmp_path, "second")
    before = logits(model, batch_of("linear"))
    for adapter in ("second", "default", "second"):
        model.set_adapter(adapter)
        assert torch.equal(logits(model, batch_of("linear")), before)
    numels = {name: parameter.numel() for name, parameter in build("linear").named_parameters()}
    assert len(decoded) == sum(len(indices) < numels[name] for name, indices in child_of(model).items())


def test_what_is_loaded_otherwise_is_decoded_for_itself(tmp_path):
    """The positions of a file are not taken for those of another block that got into the buffers."""
    first, second = (chosen_model("linear", variant="random", seed=seed) for seed in (1, 2))
    move(first)
    move(second)
    first.save_pretrained(tmp_path)
    wanted = logits(second, batch_of("linear"))
    loaded = PeftModel.from_pretrained(build("linear"), tmp_path)
    with torch.no_grad():
        for (name, buffer), (_, other) in zip(loaded.named_buffers(), second.named_buffers(), strict=True):
            assert buffer.shape == other.shape, name
            buffer.copy_(other)
        for parameter, other in zip(loaded.parameters(), second.parameters(), strict=True):
            parameter.copy_(other)
    assert torch.equal(logits(loaded, batch_of("linear")), wanted)
