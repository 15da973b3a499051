"""Numbers of several seeds as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.grid.intervals import bootstrap_interval
from benchmarks.grid.runs import Known, Run, Source


MISSING = "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean_and_deviation(values: Mapping[int, float], wanted: int, digits: int = 1) -> str:
    """Mean and standard deviation over seeds, and how many there are if some are missing."""
    if not values:
        return MISSING
    deviation = f" ± {stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values.values()):.{digits}f}{deviation}" + (f" (of {len(values)})" if len(values) < wanted else "")


def of_seeds(statistic: str, count: int) -> str:
    """What the numbers of a page are: a statistic of so many seeds, or the only one."""
    return f"{statistic} of {count} seeds" if count > 1 else "One seed" if statistic[0].isupper() else "one seed"


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """Mean difference over the seeds that both have, and its interval."""
    differences = paired(values, baseline)
    if len(differences) < 2:
        return MISSING
    low, high = bootstrap_interval(differences)
    return f"{fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]"


def average(columns: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean of several columns for each seed that all of them have."""
    seeds = set.intersection(*(set(column) for column in columns))
    return {seed: fmean(column[seed] for column in columns) for seed in sorted(seeds)}


def circumstances(results: Iterable[Mapping[str, Any]]) -> str:
    """The processors and the versions that results were made with, and how many with each."""
    found = Counter((each["processor"], *each["versions"].items()) for each in results)
    shown = {
        f"{processor}, {', '.join(' '.join(version) for version in versions)}": count
        for (processor, *versions), count in found.items()
    }
    lines = [f"- {name}; runs: {count}" for name, count in shown.items()]
    return "\n".join(["Made with:\n", *lines, ""]) if lines else ""


def failures(runs: Iterable[Run], source: Source, known: Known) -> str:
    """The runs that have failed, with their reasons."""
    commands = dict.fromkeys(run.command(source) for run in runs)
    failed = {command: known[command]["error"] for command in commands if "error" in known.get(command, {})}
    lines = [f"- `{command}`: {reason.splitlines()[0]}" for command, reason in failed.items()]
    return "\n".join(["\nFailed runs:\n", *lines, ""]) if failed else ""
