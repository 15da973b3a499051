"""The random gradient mask: what it draws, when it draws anew, and what it does to a gradient."""

import math

import pytest
import torch

from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.gradient_mask import GradientMask


@pytest.mark.parametrize("density", [0.001, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-9])
def test_the_share_of_kept_entries_is_the_density(density):
    numel = 1_000_000
    for step in range(3):
        kept = int(GradientMask(density, step=step).draw("a.weight", numel).sum())
        assert abs(kept - density * numel) <= 4 * math.sqrt(numel * density * (1 - density)) + 1


def test_the_undecided_byte_is_decided_as_often_as_it_should():
    """A density between two bytes: 0.3 * 256 = 76.8, so that 77 or 76 bytes alone would be 3 and 13 sigma off."""
    numel = 20_000_000
    kept = int(GradientMask(0.3).draw("a.weight", numel).sum())
    assert abs(kept - 0.3 * numel) <= 4 * math.sqrt(numel * 0.3 * 0.7)


def test_a_mask_depends_on_seed_step_and_name_alone():
    mask = GradientMask(0.5, seed=3, step=7)
    drawn = mask.draw("a.weight", 1000)
    assert torch.equal(mask.draw("a.weight", 1000), drawn)
    others = [mask._replace(seed=4), mask._replace(step=8)]
    assert all(not torch.equal(other.draw("a.weight", 1000), drawn) for other in others)
    assert not torch.equal(mask.draw("b.weight", 1000), drawn)
    torch.manual_seed(9)
    assert torch.equal(GradientMask(0.5, seed=3, step=7).draw("a.weight", 1000), drawn)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9])
def test_any_number_of_entries(numel):
    assert GradientMask(0.5).draw("a", numel).shape == (numel,)


def test_masks_of_consecutive_steps_and_of_equal_shapes_are_independent():
    density, numel = 0.3, 1_000_000
    mask = GradientMask(density)
    first = mask.draw("a.weight", numel)
    for other in (mask._replace(step=1).draw("a.weight", numel), mask.draw("b.weight", numel)):
        both = int((first & other).sum())
        chance = density**2
        assert abs(both - chance * numel) <= 4 * math.sqrt(numel * chance * (1 - chance))


def test_several_steps_with_one_mask():
    mask = GradientMask(0.5, every=3)
    drawn = [mask._replace(step=step).draw("a", 1000) for step in range(7)]
    assert [step for step in range(1, 7) if not torch.equal(drawn[step], drawn[step - 1])] == [3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_masked_gradient_is_by_definition(dtype):
    gradient = torch.randn(6, 50, dtype=dtype)
    mask = GradientMask(0.3, step=2)
    masked = mask.apply("a.weight", gradient)
    kept = mask.draw("a.weight", 300).view(6, 50)
    assert torch.equal(masked[kept], gradient[kept] / 0.3)
    assert not masked[~kept].any()
    assert masked.dtype == dtype


def test_theorem_1_of_the_paper():
    """Mean and variance of the SGD update over many masks and batches, for gradients of known mean and variance."""
    draws, numel, density, lr, sigma, batch = 4000, 64, 0.3, 0.1, 0.5, 4
    mean = torch.linspace(-2, 2, numel, dtype=torch.float64)
    noise = torch.randn(draws, numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = mean + noise * sigma / math.sqrt(batch)
    updates = torch.stack(
        [-lr * GradientMask(density, step=step).apply("a", gradient) for step, gradient in enumerate(gradients)]
    )
    variance = lr**2 * (sigma**2 / (batch * density) + (1 - density) / density * mean**2)
    assert ((updates.mean(0) + lr * mean).abs() <= 4.5 * (variance / draws).sqrt()).all()
    # The fourth moment bounds how far a sample variance strays.
    fourth = ((updates - updates.mean(0)) ** 4).mean(0)
    assert ((updates.var(0) - variance).abs() <= 4.5 * ((fourth - variance**2) / draws).sqrt()).all()


def test_packing():
    mask = GradientMask(0.1, seed=2**63 - 1, every=4, step=12)
    packed = mask.pack()
    assert (packed.dtype, packed.shape) == (torch.int64, (4,))
    assert GradientMask.unpack(packed) == mask
    by_channel = mask._replace(by_channel=True)
    assert GradientMask.unpack(by_channel.pack()) == by_channel
    for wrong in (packed.int(), packed[:3], packed * 0, packed.index_fill(0, torch.tensor([0]), -1)):
        with pytest.raises(ValueError, match="A gradient mask"):
            GradientMask.unpack(wrong)


def test_channels_keep_or_lose_their_gradients_together():
    """Given as a layout, or as the channel of each entry."""
    layout = ChannelLayout(2, 3, 4, 2)
    mask, gradient = GradientMask(0.5, by_channel=True), torch.randn(layout.numel)
    channel = layout.channel_of(torch.arange(layout.numel))
    found = mask.apply("a", gradient, layout)
    assert torch.equal(found, mask.apply("a", gradient, channel))
    kept = mask.draw("a", layout.number)
    assert 0 < int(kept.sum()) < layout.number
    assert torch.equal(found, torch.where(kept[channel], gradient / 0.5, 0.0))
