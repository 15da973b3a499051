"""Peak memory of a training step, counted by PyTorch's CPU allocator."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import peak_allocated
from peft_child import ChildTuningConfig


WIDTH = 128
DENSE = 4 * WIDTH * WIDTH  # bytes of one weight, or of its gradient


def peak_of_a_step(layers, chosen):
    """Largest number of bytes alive at once during one step, beyond what was there before it."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    density = chosen / (layers * WIDTH * WIDTH)
    names = [str(layer) for layer in range(layers)]
    model = get_peft_model(base, ChildTuningConfig(variant="random", density=density, target_modules=names))
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(delta.numel() for delta in deltas) == chosen
    optimizer = torch.optim.AdamW(deltas, foreach=False)
    x = torch.randn(1, WIDTH)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # optimizer states and decoded indices are there to stay
    return peak_allocated(step)


def test_peak_memory_grows_with_the_child_network_and_not_with_the_model():
    chosen = 16_384
    small, large = peak_of_a_step(4, chosen), peak_of_a_step(32, chosen)
    assert small > DENSE  # the composed weight or the dense gradient of one layer must have been seen
    weights_more = 28 * DENSE
    assert large - small < 0.05 * weights_more

    more = peak_of_a_step(32, 4 * chosen)
    per_entry = (more - large) / (3 * chosen)
    assert 2 < per_entry < 8  # the gradients of the deltas, 4 bytes an entry, and what one layer needs for a moment


def test_the_count_sees_dense_gradients():
    """The same count for full fine-tuning does grow with the model."""
    peaks = []
    for layers in (4, 32):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(torch.randn(1, WIDTH)).square().sum().backward()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        peaks.append(sum(event.nbytes() for event in events))
    assert peaks[1] - peaks[0] == pytest.approx(28 * DENSE, rel=0.05)
