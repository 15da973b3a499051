"""Pages that stand by themselves."""

import json
import re
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from peft_child.card.charts import Chart
from peft_child.card.page import Section, write_page


CHART = Chart([{"type": "bar", "y": [1, 2], "hovertext": ["</script>", "&lt;"]}], {"title": {"text": "x"}}, 300, 200)
HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & \ud800 \x00"
SECTIONS = [
    Section(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE, HOSTILE)], CHART),
    Section("no chart"),
    Section("", chart=CHART),
]


SCRIPT = re.compile("<script[^>]*>(.*?)</script>", re.DOTALL)


class Page(HTMLParser):
    """The elements of a page, its texts, and its scripts, of which the first one holds the charts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts = [], []
        source = path.read_bytes().decode()
        self.scripts = SCRIPT.findall(source)
        self.feed(SCRIPT.sub("<script></script>", source))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("plotly")
    write_page(tmp_path / "page.html", HOSTILE, SECTIONS)
    return Page(tmp_path / "page.html")


def test_texts_are_shown_as_they_are(page):
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img"), tags.count("section")) == (3, 0, 3)
    shown = HOSTILE.replace("\ud800", "\\ud800").replace("\x00", "\\x00")
    assert [text for text in page.texts if "alert" in text] == [shown] * 7  # title, headings, paragraph, cells


def test_charts_are_in_the_page(page):
    charts = json.loads(page.scripts[0])
    assert charts == [{"data": CHART.data, "layout": CHART.layout}] * 2
    places = [attributes for tag, attributes in page.elements if "chart-" in attributes.get("id", "")]
    style = "height: 300px; min-width: 200px"
    assert places == [{"id": f"chart-{number}", "style": style} for number in range(2)]


def test_a_page_refers_to_nothing_and_runs_only_its_own_scripts(page):
    assert not [name for _, attributes in page.elements for name in attributes if name in ("src", "href")]
    [policy] = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    _, *scripts = page.scripts
    hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
    assert policy.startswith(f"default-src 'none'; script-src {' '.join(hashes)};")
    assert not any("\r" in script for script in scripts)  # which browsers replace, before they compare


def test_equal_sections_make_equal_pages(tmp_path):
    pytest.importorskip("plotly")
    for name, sections in (("a", SECTIONS), ("b", list(SECTIONS)), ("c", SECTIONS[:1])):
        write_page(tmp_path / name, "title", sections)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != third


def test_a_page_needs_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    with pytest.raises(ImportError, match="plotly"):
        write_page(tmp_path / "page.html", "title", SECTIONS)
    assert not list(tmp_path.iterdir())
