"""torch.compile: one graph, and the training that eager execution gives."""

import pytest
import torch
from peft import PeftModel
from torch._dynamo.testing import CompileCounterWithBackend

from ..helpers import checkpoint_activations, chosen_model, logits, move
from ..problems import batch_of, build


pytestmark = pytest.mark.slow

CASES = [
    ("linear", "task_driven", "entry", "aot_eager"),
    ("linear", "random", "entry", "aot_eager"),
    ("bert", "task_driven", "entry", "aot_eager"),
    ("bert", "task_driven", "input_channel", "aot_eager"),
    ("llama", "random", "entry", "aot_eager"),
    ("llama", "task_free", "entry", "aot_eager"),
    ("linear", "task_driven", "entry", "inductor"),
    ("llama", "random", "input_channel", "inductor"),
    ("llama", "task_free", "entry", "inductor"),
]


@pytest.fixture(autouse=True)
def _forgotten_graphs():
    torch._dynamo.reset()


def losses(forward, model, steps=5):
    """Losses of some AdamW steps, each on another batch."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    found = []
    for step in range(steps):
        loss = forward(**batch_of(model.problem, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def model_of(name, **changes):
    model = chosen_model(name, **changes).eval()  # no dropout, whose numbers inductor draws in another way
    model.problem = name
    return model


@pytest.mark.parametrize(("name", "variant", "granularity", "backend"), CASES)
def test_training_has_one_graph_and_the_losses_of_eager_execution(name, variant, granularity, backend):
    model = model_of(name, variant=variant, granularity=granularity)
    expected = losses(model, model)
    assert expected[-1] != expected[0]
    compiler = CompileCounterWithBackend(backend)
    model = model_of(name, variant=variant, granularity=granularity)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)  # a graph break is an error
    torch.testing.assert_close(losses(compiled, model), expected, rtol=1e-6, atol=1e-6)
    assert compiler.frame_count == 1  # new values of the delta are no reason to compile again


def test_a_loaded_adapter_has_one_graph_at_once(tmp_path):
    """Its indices have never been decoded before the compiler comes."""
    model, batch = model_of("llama"), batch_of("llama")
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, logits(model, batch))

        other = chosen_model("llama", variant="random")  # another child network of the same size
        move(other)
        other.save_pretrained(tmp_path / "other")
        loaded.load_adapter(tmp_path / "other", "default")
        assert torch.equal(compiled(**batch).logits, logits(other, batch))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_equal_those_of_eager_execution(backend):
    model, batch = model_of("bert"), batch_of("bert")
    move(model)
    loss = model(**batch).loss
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True)(**batch).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    for key, value in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(value.grad, gradients[key], rtol=1e-5, atol=1e-7)


def test_a_compiled_model_follows_its_adapter():
    model, batch = model_of("llama"), batch_of("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = logits(build("llama"), batch)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, plain)
        move(model)
        moved = logits(model, batch)
        assert not torch.equal(moved, plain)
        assert torch.equal(compiled(**batch).logits, moved)
        with model.disable_adapter():
            assert torch.equal(compiled(**batch).logits, plain)
        assert torch.equal(compiled(**batch).logits, moved)
        model.merge_adapter()
        assert torch.equal(compiled(**batch).logits, moved)


def checkpointed(reentrant):
    model = model_of("llama").train()  # Llama has no dropout, and checkpoints in training mode alone
    base = model.base_model.model
    base.config.use_cache = False
    checkpoint_activations(base, reentrant)
    return model, base


def test_activation_checkpointing_breaks_no_graph():
    expected = losses(*[model_of("llama")] * 2, steps=3)
    model, base = checkpointed(reentrant=False)
    base.disable_input_require_grads()  # a hook that transformers adds for any PEFT adapter; it breaks the graph
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(losses(compiled, model, steps=3), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks for it itself
def test_reentrant_checkpointing_as_transformers_sets_it_up():
    expected = losses(*[model_of("llama")] * 2, steps=3)
    model, base = checkpointed(reentrant=True)
    base.enable_input_require_grads()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(losses(compiled, model, steps=3), expected, rtol=1e-6, atol=1e-6)
