"""What the charts show, against numbers that are computed from dense tensors."""

import pytest
import torch

from peft_child.card.charts import child_network_chart, delta_chart, overlap_chart, plain
from peft_child.card.delta_counts import DeltaCounts, count_deltas
from peft_child.tensors.delta import ChildSize, Overlap, SparseDelta, overlap

from .test_model_card import SIZES
from .test_plot import EVERY_KIND


NAMES = {
    ("0", "q"): ["m.layers.0.q.weight", "m.layers.0.q.bias"],
    ("0", "up"): ["m.layers.0.up.weight"],
    ("12", "up"): ["m.layers.12.up.weight"],
    ("none", "m.embed"): ["m.embed.weight"],
}


def child_of(mask, values):
    indices = mask.flatten().nonzero().flatten()
    return SparseDelta(tuple(mask.shape), indices, values.flatten()[indices])


def cells(chart):
    """Percent and lines of the hover label by layer and module, without the empty cells."""
    [trace] = chart.data
    labels = [chart.layout["xaxis"]["labelalias"][key] for key in trace["x"]]
    return {
        (layer, label): (percent, text.split("<br>"))
        for layer, row, texts in zip(trace["y"], trace["z"], trace["hovertext"], strict=True)
        for label, percent, text in zip(labels, row, texts, strict=True)
        if percent is not None
    }


def place_line(layer):
    return "outside the layers" if layer == "none" else f"layer {layer}"


@pytest.fixture
def masks():
    return {name: torch.rand(4, 6) < 0.4 for names in NAMES.values() for name in names}


def test_the_heat_map_shows_where_entries_are_chosen_and_how_far_they_moved(masks):
    dense = {name: torch.randn(mask.shape, dtype=torch.float64) for name, mask in masks.items()}
    deltas = {name: child_of(mask, dense[name]) for name, mask in masks.items()}
    sizes = {name: ChildSize(24, int(mask.sum()), 9) for name, mask in masks.items()}
    chart = child_network_chart(dict(reversed(sizes.items())), count_deltas(deltas).sums)
    found = cells(chart)
    assert list(found) == list(NAMES)
    for (layer, kind), names in NAMES.items():
        chosen = sum(int(masks[name].sum()) for name in names)
        mean = torch.cat([dense[name][masks[name]].abs() for name in names]).mean()
        percent, lines = found[layer, kind]
        assert percent == pytest.approx(100 * chosen / (24 * len(names)))
        assert lines == [
            kind,
            place_line(layer),
            f"chosen: {percent:.3g}%",
            f"chosen entries: {chosen:,}",
            f"targeted entries: {24 * len(names):,}",
            f"mean |delta|: {mean:.3g}",
        ]
    assert chart.data[0]["zmax"] == max(percent for percent, _ in found.values())
    assert chart.data[0]["colorbar"]["title"]["text"] == "chosen entries (%)"
    assert [chart.layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")] == ["module", "layer"]


def test_the_heat_map_shows_what_two_adapters_share(masks):
    others = {name: torch.rand(mask.shape) < 0.4 for name, mask in masks.items()}
    values = torch.ones(4, 6)
    found = cells(
        overlap_chart({name: overlap(child_of(masks[name], values), child_of(others[name], values)) for name in masks})
    )
    assert found.keys() == NAMES.keys()
    for (layer, kind), names in NAMES.items():
        first, second = (torch.cat([part[name] for name in names]) for part in (masks, others))
        both, either = int((first & second).sum()), int((first | second).sum())
        percent, lines = found[layer, kind]
        assert percent == pytest.approx(100 * both / either)
        assert lines == [
            kind,
            place_line(layer),
            f"Jaccard index: {percent:.3g}%",
            f"in both: {both:,}",
            f"in either: {either:,}",
            f"in the first: {int(first.sum()):,}",
            f"in the second: {int(second.sum()):,}",
            f"shared, times chance: {both * first.numel() / (int(first.sum()) * int(second.sum())):.3g}",
        ]


def test_the_histogram_shows_deltas_of_both_signs():
    values = torch.tensor([1.5e-3, 1.4e-3, -1.3e-3, 0.11, 0.0])
    below, above = delta_chart(count_deltas({"w": child_of(torch.ones(5) > 0, values)})).data
    assert (below["name"], above["name"]) == ("delta &lt; 0", "delta &gt; 0")
    assert below["x"] == above["x"] == [-28.5, -9.5]  # tenths of a factor of ten
    assert (below["y"], above["y"]) == ([1, 0], [2, 1])
    assert (
        below["hovertext"]
        == above["hovertext"]
        == [
            "|delta| from 0.00126 to 0.00158<br>below zero: 1<br>above zero: 2",
            "|delta| from 0.1 to 0.126<br>below zero: 0<br>above zero: 1",
        ]
    )


def test_axes_of_histograms_are_readable():
    chart = delta_chart(DeltaCounts({}, {0: 1}, {6322: 3}, 0))  # from the smallest to the largest float64
    assert len(chart.layout["xaxis"]["tickvals"]) <= 8
    assert chart.layout["xaxis"]["ticktext"][0] == "10<sup>\N{MINUS SIGN}324</sup>"
    assert chart.layout["yaxis"]["dtick"] == 1  # of few deltas there are no fractions
    assert "dtick" not in delta_chart(DeltaCounts({}, {0: 3}, {0: 3}, 0)).layout["yaxis"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("<b>x</b> &lt;", "&lt;b&gt;x&lt;/b&gt; &amp;lt;"),
        ("\u202ex\n\x1b[0m", "\\u202ex \\x1b[0m"),
        ("y" * 31, "..." + "y" * 30),
        ("__proto__", "__proto__"),
        ("\ud800", "\\ud800"),
    ],
)
def test_names_of_others_are_shown_as_they_are(name, label):
    chart = child_network_chart({f"{name}.weight": ChildSize(10, 1, 5)}, {f"{name}.weight": 1.0})
    [trace] = chart.data
    assert trace["x"] == ["module 0"]
    assert chart.layout["xaxis"]["labelalias"] == {"module 0": label}
    assert trace["hovertext"][0][0].startswith(label if len(name) < 31 else name)


def test_long_names_are_folded_in_hover_labels():
    chart = child_network_chart({"part-" * 100: ChildSize(10, 1, 5)}, {"part-" * 100: 1.0})
    lines = chart.data[0]["hovertext"][0][0].split("<br>")
    assert max(map(len, lines)) <= 36
    assert len(lines) < 13


def test_control_characters_are_not_shown():
    assert plain("a\n b\t\x07") == "a b \\x07"


@pytest.mark.parametrize("sizes", EVERY_KIND.values(), ids=EVERY_KIND)
def test_every_child_network_makes_charts_that_plotly_accepts(sizes):
    plotly = pytest.importorskip("plotly.graph_objects")
    charts = [
        child_network_chart(sizes, dict.fromkeys(sizes, 1.0)),
        overlap_chart(dict.fromkeys(sizes, Overlap(0, 1, 2, 10))),
        delta_chart(DeltaCounts({}, {3100: 4}, {3100: 5, 3200: 1}, 0)),
    ]
    for chart in charts:
        plotly.Figure(data=chart.data, layout=chart.layout)  # raises an error if something is not valid
        assert chart.height < 3000


def test_charts_show_zero_percent():
    chart = overlap_chart(dict.fromkeys(SIZES, Overlap(0, 1, 2, 10)))
    assert chart.data[0]["zmax"] == 1
