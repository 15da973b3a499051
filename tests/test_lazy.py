"""A mapping that computes its items when they are asked for."""

import pytest

from peft_child.lazy import Lazy


def test_items_are_computed_when_they_are_asked_for_and_not_kept():
    asked = []
    squares = Lazy(["3", "1", "2"], lambda name: asked.append(name) or int(name) ** 2)
    assert list(squares) == ["3", "1", "2"]
    assert len(squares) == 3
    assert "1" in squares
    assert "4" not in squares
    assert asked == []
    assert dict(squares) == {"3": 9, "1": 1, "2": 4}
    assert squares["1"] == 1
    assert asked == ["3", "1", "2", "1"]


def test_other_names_are_not_computed():
    empty = Lazy([], lambda name: pytest.fail("computed"))
    assert not empty
    assert empty.get("a") is None
    with pytest.raises(KeyError, match="a"):
        empty["a"]


def test_every_loop_is_wrapped():
    loops = []
    items = Lazy(["a", "b"], str.upper, lambda names: loops.append(names) or names)
    assert list(items.values()) == ["A", "B"]
    assert list(items.items()) == [("a", "A"), ("b", "B")]
    assert loops == [["a", "b"]] * 2
