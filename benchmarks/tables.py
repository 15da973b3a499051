"""Pieces of the pages."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with numbers to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ms(seconds: Sequence[float] | None) -> str:
    """Median in milliseconds, with three digits."""
    if seconds is None:
        return ""
    number = 1e3 * median(seconds)
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def made_with(results: Mapping[str, Any]) -> str:
    """Command, machine and versions."""
    versions = ", ".join(f"{name} {number}" for name, number in results["machine"]["versions"].items())
    facts = ", ".join(f"{key}: {value}" for key, value in results["machine"].items() if key != "versions")
    return f"`{results['command']}`, {results['turns']} turns, {results['seconds']:.0f} s. {facts}. {versions}."
