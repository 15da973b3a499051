"""Whole input channels: where their entries are, how they are chosen, and what is refused."""

import pytest
import torch

from peft_child.tensors.channels import ChannelLayout, Channels, choose_channels


LAYOUTS = {
    "linear": (ChannelLayout(1, 5, 7, 1), (5, 7), lambda tensor, c: tensor[:, c]),
    "embedding": (ChannelLayout(1, 1, 5, 7), (5, 7), lambda tensor, c: tensor[c]),
    "convolution": (ChannelLayout(1, 4, 3, 6), (4, 3, 2, 3), lambda tensor, c: tensor[:, c]),
    "experts": (ChannelLayout(3, 4, 5, 1), (3, 4, 5), lambda tensor, c: tensor[c // 5, :, c % 5]),
    "transposed experts": (ChannelLayout(3, 1, 4, 5), (3, 4, 5), lambda tensor, c: tensor[c // 4, c % 4]),
    "bias": (ChannelLayout(1, 1, 1, 6), (6,), lambda tensor, c: tensor),
    "norm": (ChannelLayout(1, 1, 6, 1), (6,), lambda tensor, c: tensor[c]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_where_the_entries_of_channels_are(kind):
    layout, shape, channel = LAYOUTS[kind]
    tensor = torch.rand(shape)
    assert layout.numel == tensor.numel()
    assert layout.number * layout.size == layout.numel
    chosen = torch.arange(layout.number)[::2]
    expected = torch.zeros(shape)
    for number in chosen.tolist():
        channel(expected, number).fill_(1)
        torch.testing.assert_close(layout.sums(tensor)[number], channel(tensor, number).sum())
    positions = layout.positions(chosen)
    assert torch.equal(positions, expected.flatten().nonzero().flatten())
    assert torch.equal(layout.holding(positions), chosen)
    if layout.size > 1:
        with pytest.raises(ValueError, match="must hold whole channels; this one cuts some"):
            layout.holding(positions[1:])


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_a_delta_in_the_order_of_positions_is_a_matrix_of_channels(kind):
    layout, shape, channel = LAYOUTS[kind]
    channels = Channels(layout, torch.tensor([0, 2]))
    delta = torch.rand(2 * layout.size)
    tensor = torch.zeros(shape)
    channels.of(tensor).index_copy_(1, channels.chosen, channels.as_block(delta))
    assert torch.equal(tensor.flatten()[channels.positions()], delta)
    channels.add_to(tensor, delta)
    assert torch.equal(tensor.flatten()[channels.positions()], delta + delta)
    assert torch.equal(channel(tensor, 1), torch.zeros_like(channel(tensor, 1)))


def by_hand(scores, layouts, budget):
    """The definition: one channel after the other, the best mean first."""
    ranked = [
        (-(float(score) / layouts[name].size), order, number, name)
        for order, name in enumerate(scores)
        for number, score in enumerate(scores[name])
    ]
    chosen = {name: [] for name in scores}
    left = budget
    for *_, number, name in sorted(ranked):
        left -= layouts[name].size
        if left < 0:
            break
        chosen[name].append(number)
    return {name: sorted(numbers) for name, numbers in chosen.items()}


@pytest.mark.parametrize("budget", [7, 8, 20, 33, 90])
def test_the_best_means_are_chosen_until_the_next_exceeds_the_budget(budget):
    layouts = {"a": ChannelLayout(1, 7, 5, 1), "b": ChannelLayout(1, 1, 9, 1), "c": ChannelLayout(1, 1, 4, 12)}
    torch.manual_seed(budget)
    scores = {name: torch.randint(1, 4, (layout.number,)) * layout.size / 2 for name, layout in layouts.items()}
    found = choose_channels(scores, layouts, budget)
    assert {name: numbers.tolist() for name, numbers in found.items()} == by_hand(scores, layouts, budget)
    assert 0 < sum(len(numbers) * layouts[name].size for name, numbers in found.items()) <= budget


def test_a_budget_below_one_channel_names_the_smallest_density():
    layouts = {"a": ChannelLayout(1, 30, 7, 1)}
    scores = {"a": torch.arange(7).float()}
    with pytest.raises(ValueError, match=r"29 of 210 entries.* has 30. The smallest density that works is 0.1429"):
        choose_channels(scores, layouts, 29)
    assert round(0.1429 * 210) == 30
    assert choose_channels(scores, layouts, 30)["a"].tolist() == [6]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_that_are_none(value):
    with pytest.raises(ValueError, match="those of 'a' hold another value"):
        choose_channels({"a": torch.tensor([1.0, value])}, {"a": ChannelLayout(1, 2, 2, 1)}, 4)
