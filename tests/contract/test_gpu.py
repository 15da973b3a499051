"""The promises of the method on a GPU; every test is skipped without one."""

import pytest
import torch
from peft import PeftModel

from ..helpers import assert_same, child_of, chosen_model, logits, snapshot, train
from ..problems import batch_of, build


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("granularity"),
]


def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["random", "task_free"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mixtral"])
def test_training_merging_and_loading_on_a_gpu(name, variant, dtype, tmp_path):
    model = chosen_model(name, build(name, dtype=dtype).cuda(), variant=variant, task_type=None)
    batch = on_gpu(batch_of(name))
    before = snapshot(model)
    train(model.train(), [batch] * 3)
    moved = {key for key, value in snapshot(model).items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".child_" in key for key in moved)
    unmerged = logits(model, batch)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    assert torch.equal(logits(model, batch), unmerged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), unmerged)
    loaded = PeftModel.from_pretrained(build(name, dtype=dtype).cuda(), tmp_path)
    assert torch.equal(logits(loaded, batch), unmerged)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_choice_on_a_gpu_is_nearly_that_on_the_cpu(name):
    from peft_child import select_child_network

    here = chosen_model(name, task_type=None)
    there = chosen_model(name, build(name).cuda(), task_type=None)
    select_child_network(there, [on_gpu(batch_of(name))], progress_bar=False)
    same = sum(int(torch.isin(child_of(there)[key].cpu(), found).sum()) for key, found in child_of(here).items())
    assert same >= 0.97 * sum(map(len, child_of(here).values()))  # gradients are rounded otherwise


def test_a_random_choice_on_a_gpu_is_that_on_the_cpu():
    here, there = (
        chosen_model("llama", variant="random"),
        chosen_model("llama", build("llama").cuda(), variant="random"),
    )
    assert_same({key: found.cpu() for key, found in child_of(there).items()}, child_of(here))


def test_a_compiled_step_on_a_gpu_is_that_of_eager_execution():
    model, batch = chosen_model("llama", build("llama").cuda(), variant="random").eval(), on_gpu(batch_of("llama"))
    model(**batch).loss.backward()
    expected = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(**batch).loss.backward()
    for key, value in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(value.grad, expected[key], rtol=1e-4, atol=1e-6)
