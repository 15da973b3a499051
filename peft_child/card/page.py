"""Pages of HTML that stand by themselves: text, tables, and charts that plotly.js draws, which is in the page.

A page makes no request, and runs no script but its own two: it carries a policy (Content-Security-Policy) by which
browsers refuse both, whatever is in the texts.
"""

from __future__ import annotations

import html
import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from peft_child.card.charts import Chart, plain


DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
charts.forEach(({data, layout}, number) =>
  Plotly.newPlot(`chart-${number}`, data, layout, {responsive: true, displayModeBar: false, typesetMath: false}));
"""

STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #222222; background: white; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, p, td, th { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.25rem; }
p { margin: 0 0 0.75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid #d9d9d9; text-align: left; vertical-align: top; }
th { font-weight: normal; color: #595959; min-width: 6rem; }
td { min-width: 6rem; }
"""


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: Its heading.
        text: A paragraph below it; may be empty.
        table: Rows of cells, of which the first one is the heading of its row; may be empty.
        chart: What is drawn below them, if anything.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    chart: Chart | None = None


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page of HTML with charts, about 5 MB, which needs no network.

    Equal sections make equal files. All texts are escaped.

    Args:
        path: The file to write.
        title: Of the page.
        sections: What it shows, in this order.

    Raises:
        ImportError: If plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    scripts = get_plotlyjs(), DRAW
    charts = [section.chart for section in sections if section.chart]
    content = json.dumps([{"data": chart.data, "layout": chart.layout} for chart in charts], allow_nan=False)
    numbers = iter(range(len(charts)))
    page = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_escaped(title)}</h1>",
        *(_section(section, numbers) for section in sections),
        "</main>",
        # A tag in a string could end the element.
        '<script type="application/json" id="charts">' + content.replace("<", "\\u003c") + "</script>",
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    Path(path).write_bytes("\n".join(page).encode())


def _policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"


def _section(section: Section, numbers: Iterator[int]) -> str:
    parts = [f"<h2>{_escaped(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{_escaped(section.text)}</p>")
    if section.table:
        parts.append(f'<div class="wide"><table>{"".join(map(_row, section.table))}</table></div>')
    if section.chart:
        size = f"height: {section.chart.height}px; min-width: {section.chart.min_width}px"
        parts.append(f'<div class="wide"><div id="chart-{next(numbers)}" style="{size}"></div></div>')
    return "\n".join(["<section>", *parts, "</section>"])


def _row(cells: Sequence[str]) -> str:
    heading, *others = map(_escaped, cells)
    return f'<tr><th scope="row">{heading}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>\n'


def _escaped(text: str) -> str:
    return html.escape(plain(text))
