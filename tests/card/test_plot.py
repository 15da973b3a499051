"""Where a child network lies, as numbers and as a heat map."""

import pytest

from peft_child.card.plot import Place, _drawn, draw_child_network, grouped, places_of
from peft_child.tensors.delta import ChildSize, total_size

from .test_model_card import SIZES


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.weight", Place(11, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn.bias", Place(0, "attn.c_attn")),
        ("model.layers.2.mlp.experts.gate_up_proj", Place(2, "mlp.experts.gate_up_proj")),
        ("model.layers.2.mlp.experts.7.w1.weight", Place(2, "mlp.experts.*.w1")),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", Place(3, "layer.*.SelfAttention.q")),
        ("0.linear.weight", Place(0, "linear")),
        ("body.0.weight", Place(None, "body.0")),
        ("conv1.x2.weight", Place(None, "conv1.x2")),
        ("weight", Place(None, "weight")),
    ],
)
def test_the_name_of_a_parameter_tells_its_place(name, place):
    assert places_of([name]) == {name: place}


def test_sizes_add_up_by_kind():
    kinds = grouped(SIZES, lambda place: place.kind)
    assert list(kinds) == ["self_attn.q_proj", "mlp.up_proj", "model.embed_tokens"]
    assert total_size(kinds["self_attn.q_proj"]) == ChildSize(210, 51, 150)
    assert total_size([]) == ChildSize(0, 0, 0)


def test_different_lists_of_layers_are_kept_apart():
    places = places_of(f"{side}.block.0.q.weight" for side in ("encoder", "decoder"))
    assert [place.kind for place in places.values()] == ["decoder.block.*.q", "encoder.block.*.q"]


def test_equal_child_networks_make_equal_pictures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    draw_child_network(SIZES, tmp_path / "a.png")
    _drawn.cache_clear()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 10}):
        draw_child_network(dict(reversed(SIZES.items())), str(tmp_path / "b.png"))
        assert matplotlib.rcParams["font.size"] == 20
    draw_child_network({**SIZES, "model.layers.0.mlp.up_proj.weight": ChildSize(10, 1, 5)}, tmp_path / "c.png")
    first, second, third = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first.startswith(b"\x89PNG")
    assert first == second != third


def test_a_picture_is_drawn_once(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    _drawn.cache_clear()
    draw_child_network(SIZES, tmp_path / "a.png")
    monkeypatch.delattr(matplotlib.Figure, "savefig")
    draw_child_network(SIZES, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


EVERY_KIND = {
    "root": {"weight": ChildSize(10, 1, 5)},
    "no layers": {"body.0.weight": ChildSize(10, 10, 5), "body.2.bias": ChildSize(10, 1, 5)},
    "odd names": {"$x$.\\frac{.weight": ChildSize(10, 1, 5), "層.1.x" + "y" * 500: ChildSize(10, 1, 5)},
    "deep": {f"m.{layer}.experts_{expert}.w": ChildSize(10, 1, 5) for layer in range(120) for expert in range(3)},
    "wide": {f"m.{layer}.experts_{expert}.w": ChildSize(10, 1, 5) for layer in range(2) for expert in range(130)},
}


@pytest.mark.parametrize("sizes", EVERY_KIND.values(), ids=EVERY_KIND)
def test_every_child_network_can_be_drawn(tmp_path, sizes):
    pytest.importorskip("matplotlib")
    draw_child_network(sizes, tmp_path / "x.png")
    assert 1000 < (tmp_path / "x.png").stat().st_size < 1_000_000


def test_no_child_network_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="sizes must hold at least one parameter with a child network, got none"):
        draw_child_network({}, tmp_path / "x.png")


@pytest.mark.usefixtures("no_matplotlib")
def test_drawing_needs_matplotlib(tmp_path):
    with pytest.raises(ImportError, match="matplotlib"):
        draw_child_network(SIZES, tmp_path / "x.png")
