import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_child.tensors.topk import apportion, draw_random, select_largest

from .. import reference


SHAPES = {"a": (5, 7), "b": (3,), "c": (2, 3, 4), "d": ()}
TOTAL = 35 + 3 + 24 + 1


def scores_with(levels):
    """Scores that take few different values (ties) or many, zeros among them."""
    return {
        name: torch.randint(0, levels, shape).float() ** 2 * torch.rand(()).clamp(min=0.1)
        if levels > 9
        else torch.randint(0, levels, shape).float()
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("levels", [1, 2, 3, 1000])
@pytest.mark.parametrize("size", [1, 2, 31, TOTAL - 1, TOTAL])
def test_equals_the_definition(levels, size):
    scores = scores_with(levels)
    chosen = select_largest(scores, size)
    assert sum(map(len, chosen.values())) == size
    expected = reference.largest(scores, size)
    assert all(torch.equal(chosen[name], expected[name]) for name in scores)


@given(
    st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=60),
    st.data(),
)
def test_equals_the_definition_for_any_numbers(values, data):
    scores = {"a": torch.tensor(values[::2]), "b": torch.tensor(values[1::2])}
    size = data.draw(st.integers(1, len(values)))
    expected = reference.largest(scores, size)
    chosen = select_largest(scores, size)
    assert all(torch.equal(chosen[name], expected[name]) for name in scores)


def test_exact_count_where_most_scores_are_zero():
    scores = {"a": torch.rand(1000) * (torch.rand(1000) > 0.95), "b": torch.zeros(1000)}
    assert sum(map(len, select_largest(scores, 600).values())) == 600


def test_pieces_join_to_the_whole(monkeypatch):
    monkeypatch.setattr("peft_child.tensors.topk._PIECE", 7)
    scores = scores_with(1000)
    expected = reference.largest(scores, 20)
    assert all(torch.equal(indices, expected[name]) for name, indices in select_largest(scores, 20).items())


@pytest.mark.parametrize("large", [0, 1])
def test_a_sample_that_misleads(large):
    """Every 22nd score, all that the sample sees, is unlike the others."""
    scores = torch.rand(22**3) + 1 - large
    scores[::22] += 2 * large - 1
    exact = select_largest({"a": scores}, 3000)["a"]
    assert torch.equal(exact, reference.largest({"a": scores}, 3000)["a"])


def test_many_scores_with_ties_close_to_the_threshold():
    scores = {name: (torch.rand(60_000) * 500).round() for name in "abc"}
    for size in (500, 20_000, 179_000):
        expected = reference.largest(scores, size)
        assert all(torch.equal(indices, expected[name]) for name, indices in select_largest(scores, size).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_low_precision_are_compared_as_they_are(dtype):
    scores = {name: (score / 1000).to(dtype) for name, score in scores_with(1000).items()}
    exact = reference.largest({name: score.float() for name, score in scores.items()}, 20)
    assert all(torch.equal(indices, exact[name]) for name, indices in select_largest(scores, 20).items())


def test_scores_in_a_mapped_file(tmp_path):
    mapped = torch.from_file(str(tmp_path / "scores"), shared=True, size=1000, dtype=torch.float32)
    mapped.copy_(torch.rand(1000))
    assert torch.equal(select_largest({"a": mapped}, 100)["a"], select_largest({"a": mapped.clone()}, 100)["a"])


def test_a_tensor_that_is_not_contiguous():
    score = torch.rand(4, 6)
    chosen = select_largest({"a": score.t()}, 5)
    assert torch.equal(chosen["a"], select_largest({"a": score.t().contiguous()}, 5)["a"])


@pytest.mark.parametrize("size", [0, -1, TOTAL + 1])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"size must be from 1 to {TOTAL}.*got {size}"):
        select_largest(scores_with(3), size)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_must_be_finite_and_not_negative(value):
    scores = scores_with(3)
    scores["b"][1] = value
    with pytest.raises(ValueError, match="finite and not negative; those of 'b'"):
        select_largest(scores, 3)


def test_scores_must_be_float32():
    with pytest.raises(ValueError, match=r"must be float32, bfloat16 or float16, those of 'a' are torch.float64"):
        select_largest({"a": torch.rand(3).double()}, 1)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.floats(0, 1))
def test_apportioning_is_exact_and_fair(sizes, share):
    named = {str(index): size for index, size in enumerate(sizes)}
    total = round(share * sum(sizes))
    counts = apportion(named, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - size * total / sum(sizes)) < 1 + 1e-6 for name, size in named.items())
    assert all(0 <= counts[name] <= size for name, size in named.items())


def test_random_child_depends_on_name_and_seed_alone():
    drawn = draw_random("a.weight", 1000, 100, 0)
    assert torch.equal(drawn, draw_random("a.weight", 1000, 100, 0))
    assert not torch.equal(drawn, draw_random("b.weight", 1000, 100, 0))
    assert not torch.equal(drawn, draw_random("a.weight", 1000, 100, 1))
    assert drawn.unique().numel() == 100
    assert draw_random("a.weight", 1000, 0, 0).numel() == 0


def test_random_child_is_uniform():
    hits = torch.zeros(200)
    for seed in range(300):
        hits[draw_random("a", 200, 50, seed)] += 1
    expected, deviation = 300 * 0.25, (300 * 0.25 * 0.75) ** 0.5
    assert (hits - expected).abs().max() < 5 * deviation
