"""What `--html` writes: its numbers against dense tensors, its files, and how a browser shows it."""

import html
import json
import shutil
import sys

import pytest
import torch

from peft_child.card.plot import places_of
from peft_child.cli import main as cli
from peft_child.cli.pages import write_adapters_page
from peft_child.files.adapter_folder import SparseAdapter, read_adapter, write_adapter
from peft_child.tensors.delta import SparseDelta

from ..card.test_page import Page
from ..files.test_operations import saved_adapter, saved_base
from .commands import error_of, output_of, run


def page_of(path, *arguments):
    """The page that a command writes, and its charts."""
    pytest.importorskip("plotly")
    output_of(*arguments, "--html", path, "--force", messages=f"wrote: {path}\n")
    page = Page(path)
    return page, json.loads(page.scripts[0])


def dense_parts(folder):
    """Which entries are chosen and all deltas, as dense tensors by layer and module."""
    parts = {}
    adapter = read_adapter(folder)
    for name, place in places_of(adapter.deltas).items():
        delta = adapter.deltas[name]
        mask = torch.zeros(delta.numel, dtype=torch.bool)
        change = torch.zeros(delta.numel, dtype=torch.float64)
        mask[delta.indices] = True
        change[delta.indices] = delta.values.double()
        key = ("none" if place.layer is None else str(place.layer), place.kind)
        parts.setdefault(key, []).append((mask, change))
    return {key: tuple(map(torch.cat, zip(*found, strict=True))) for key, found in parts.items()}


def hover_lines(chart):
    [trace], labels = chart["data"], chart["layout"]["xaxis"]["labelalias"]
    return {
        (layer, labels[key]): text.split("<br>")[2:]
        for layer, texts in zip(trace["y"], trace["hovertext"], strict=True)
        for key, text in zip(trace["x"], texts, strict=True)
        if text
    }


# The numbers


@pytest.mark.usefixtures("granularity")
def test_the_page_of_an_adapter_shows_its_numbers(tmp_path):
    saved_adapter(saved_base(tmp_path / "base"), tmp_path / "child")
    page, (where, how_large) = page_of(tmp_path / "page.html", "inspect", tmp_path / "child")
    parts = dense_parts(tmp_path / "child")
    assert hover_lines(where) == {
        key: [
            f"chosen: {100 * mask.double().mean():.3g}%",
            f"chosen entries: {int(mask.sum()):,}",
            f"targeted entries: {mask.numel():,}",
            f"mean |delta|: {change[mask].abs().mean():.3g}",
        ]
        for key, (mask, change) in parts.items()
    }
    change = torch.cat([change for _, change in parts.values()])
    below, above = how_large["data"]
    assert (sum(below["y"]), sum(above["y"])) == (int((change < 0).sum()), int((change > 0).sum()))
    mask, shown = torch.cat([mask for mask, _ in parts.values()]), " ".join(page.texts)
    for text in (
        f"{int(mask.sum()):,} of {mask.numel():,} in these tensors ({mask.double().mean():.3%})",
        f"{4 * int(mask.sum()):,} bytes, float32",
        f"{change.norm():.4g}",
        str(tmp_path / "base"),
        read_adapter(tmp_path / "child").settings["granularity"],
    ):
        assert text in shown


def test_the_page_of_two_adapters_shows_what_they_share(files, tmp_path):
    folders = [files / "chosen", files / "random"]
    page, charts = page_of(tmp_path / "page.html", "overlap", *folders)
    first, second = map(dense_parts, folders)
    expected = {}
    for key in first.keys() | second.keys():
        parts = [found[key][0] for found in (first, second) if key in found]
        both = int((parts[0] & parts[1]).sum()) if len(parts) == 2 else 0
        expected[key] = f"Jaccard index: {100 * both / int(sum(parts).bool().sum()):.3g}%"
    shared, *_ = charts
    assert {key: lines[0] for key, lines in hover_lines(shared).items()} == expected
    assert len(charts) == 5
    titles = [
        f"What {folders[0]} and {folders[1]} share",
        *(f"How large the deltas of {name} are" for name in folders),
    ]
    assert set(titles) <= set(page.texts)


def test_every_pair_of_adapters_has_a_map(files, tmp_path):
    _, charts = page_of(tmp_path / "page.html", "overlap", files / "chosen", files / "random", files / "chosen")
    assert len(charts) == 3 + 2 * 3


def test_deltas_that_are_all_zero_have_no_histogram(files, tmp_path):
    adapter = read_adapter(files / "chosen")
    zero = {name: delta._replace(values=torch.zeros_like(delta.values)) for name, delta in adapter.deltas.items()}
    write_adapter(tmp_path / "zero", SparseAdapter(adapter.settings, zero))
    page, charts = page_of(tmp_path / "page.html", "inspect", tmp_path / "zero")
    assert len(charts) == 1
    assert "All deltas are zero." in page.texts


def test_tensors_saved_whole_and_deltas_of_zero_are_counted(files, tmp_path):
    adapter = read_adapter(files / "chosen")
    name = next(iter(adapter.deltas))
    deltas = {name: adapter.deltas[name]}
    deltas[name].values[0] = 0
    write_adapter(tmp_path / "child", SparseAdapter(adapter.settings, deltas, {"base_model.model.x": torch.ones(5)}))
    page, _ = page_of(tmp_path / "page.html", "inspect", tmp_path / "child")
    assert {"1, 20 bytes", "1"} <= set(page.texts)
    assert any(text.endswith("1 deltas are zero, and not shown.") for text in page.texts)


# The files


def test_equal_adapters_make_equal_pages(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "copy")
    for name, folder in (("a", files / "chosen"), ("b", tmp_path / "copy"), ("c", files / "random")):
        page_of(tmp_path / name, "inspect", folder)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != third


@pytest.mark.parametrize(("verb", "names"), [("inspect", ["chosen"]), ("overlap", ["chosen", "random"])])
def test_a_page_is_replaced_only_by_force(files, tmp_path, verb, names):
    pytest.importorskip("plotly")
    path = tmp_path / "new" / "page.html"
    arguments = [verb, *(files / name for name in names), "--html", path]
    output_of(*arguments, messages=f"wrote: {path}\n")
    written = path.read_bytes()
    path.write_bytes(b"old")
    assert f"'{path}' exists already; pass --force" in error_of(*arguments)
    assert path.read_bytes() == b"old"
    output_of(*arguments, "--force", messages=f"wrote: {path}\n")
    assert path.read_bytes() == written
    assert list(path.parent.iterdir()) == [path]
    assert "is a folder; name a file" in error_of(*arguments[:-1], tmp_path)
    assert "name another file for --html" in error_of(*arguments[:-1], tmp_path / "x", "--plot", tmp_path / "x")


def test_only_names_on_the_hub_are_in_the_page(files, tmp_path, monkeypatch):
    page, _ = page_of(tmp_path / "local.html", "inspect", files / "chosen")
    assert page.texts.count("Child network") == 2  # title and heading
    monkeypatch.setattr(cli, "locate_adapter", lambda *arguments, **options: files / "chosen")
    page, _ = page_of(tmp_path / "hub.html", "inspect", "me/child")
    assert page.texts.count("Child network of me/child") == 2


def test_a_page_may_lie_in_the_adapters_folder(files, tmp_path):
    shutil.copytree(files / "chosen", tmp_path / "child")
    for _ in range(2):
        page_of(tmp_path / "child/child.html", "inspect", tmp_path / "child")


def test_a_page_is_written_though_nobody_reads_the_rest(files, tmp_path, monkeypatch):
    pytest.importorskip("plotly")

    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "print_settings", closed)
    run("inspect", files / "chosen", "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


class NoPlotly:
    """Finds no package called plotly, as where it is not installed."""

    def find_spec(self, name, *arguments):
        if name == "plotly":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_page_needs_plotly(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [NoPlotly(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    found = error_of("inspect", files / "chosen", "--html", tmp_path / "page.html")
    assert found == "error: No module named 'plotly'; install it with: pip install plotly"
    assert not list(tmp_path.iterdir())
    output_of("inspect", files / "chosen")


def test_adapters_without_a_child_network_have_no_page(tmp_path):
    with pytest.raises(ValueError, match="A page shows adapters with a child network; 'empty' has none"):
        write_adapters_page(tmp_path / "page.html", "title", ["empty"], [SparseAdapter({}, {})])


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, if that and playwright are installed."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


def hostile_delta(rows=4):
    mask = torch.rand(rows, 6) < 0.5
    return SparseDelta((rows, 6), mask.flatten().nonzero().flatten(), torch.randn(int(mask.sum())) * 1e-3)


HOSTILE_NAMES = [
    "m.0.<img src=x onerror=alert(1)> &lt; $x^2$.weight",
    "m.0.__proto__.weight",
    "m.1.hasOwnProperty.weight",
    "m.1." + "long_" * 60 + ".weight",
    "m.11.%{z} {x} ${y}.weight",
    "\u202eevil\x1b[0m.weight",
]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["hostile", "deep", "wide", "single", "overlap"])
def test_a_browser_shows_the_page(browser, tmp_path, kind, width):
    names = {
        "deep": [f"m.{layer}.{part}.weight" for layer in range(100) for part in ("q", "k", "v")],
        "wide": [f"m.{layer}.expert_{part}.weight" for layer in range(2) for part in range(60)],
        "single": ["linear.weight"],
    }.get(kind, HOSTILE_NAMES)
    settings = {"peft_type": "PEFT_CHILD", "base_model_name_or_path": "</script><script>document.title = 1</script>"}
    for folder in ("a", "b"):
        write_adapter(tmp_path / folder, SparseAdapter(settings, {name: hostile_delta() for name in names}))
    arguments = ["overlap", tmp_path / "a", tmp_path / "b"] if kind == "overlap" else ["inspect", tmp_path / "a"]
    _, charts = page_of(tmp_path / "page.html", *arguments)

    requests, problems = [], []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    url = (tmp_path / "page.html").as_uri()
    page.goto(url)
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {len(charts)}")
    assert page.title() == ("Overlap of child networks" if kind == "overlap" else "Child network")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if kind != "wide":  # a chart that is scrolled inside of the page
        assert page.evaluate("[...document.querySelectorAll('.wide')].every(e => e.scrollWidth <= e.clientWidth)")
    for expected, found, box in hovered(page, charts[0]):
        assert found == expected
        assert box["x"] >= 0
        assert kind == "wide" or box["x"] + box["width"] <= width
    last = len(charts) - 1
    assert page.locator(f"#chart-{last} .bars path").count() == sum(len(trace["y"]) for trace in charts[last]["data"])
    assert requests == [url]
    assert problems == []
    page.close()


def hovered(page, chart):
    """What the hover labels of the first cells should say, what they say, and where they are."""
    [trace] = chart["data"]
    area, label = page.locator("#chart-0 .nsewdrag"), page.locator("#chart-0 .hoverlayer .hovertext")
    cells = [
        (column, row, text)
        for row, texts in enumerate(trace["hovertext"])
        for column, text in enumerate(texts)
        if text
    ]
    for column, row, text in cells[:6]:
        across, down = (column + 0.5) / len(trace["x"]), (row + 0.5) / len(trace["y"])
        area.evaluate(
            f"e => scrollBy(0, e.getBoundingClientRect().y + {down} * e.getBoundingClientRect().height - 400)"
        )
        box = area.bounding_box()
        page.mouse.move(1, 1)
        label.wait_for(state="detached")
        page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
        label.wait_for()
        yield html.unescape(text.replace("<br>", "")), label.text_content(), label.bounding_box()
