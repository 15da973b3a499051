"""A mapping that computes its items when they are asked for."""

import pytest

from peft_child.tensors.lazy import Lazy, read_ahead


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


def test_one_item_is_read_ahead():
    asked = []
    squares = Lazy(["3", "1", "2"], lambda name: asked.append(name) or int(name) ** 2)
    ahead = read_ahead(squares, ["2", "3", "1"])
    assert asked == []
    assert next(ahead) == 4
    assert asked[:1] == ["2"]
    assert "1" not in asked
    assert list(ahead) == [9, 1]
    assert asked == ["2", "3", "1"]


def test_what_goes_wrong_ahead_is_raised_when_it_is_its_turn():
    ahead = read_ahead({"a": 1, "b": 2}, ["a", "c", "b"])
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="c"):
        next(ahead)


def test_nothing_to_read_ahead():
    assert list(read_ahead({}, [])) == []
