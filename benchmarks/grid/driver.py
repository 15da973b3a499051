"""Plans, runs and writes experiments, for the command lines of the benchmarks.

A driver that was stopped goes on where it was when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.grid.pool import Pool
from benchmarks.grid.runs import Known, Results, Run, Source, locked


class Experiment(Protocol):
    """Runs, and what is made of them."""

    def runs(self, known: Known) -> Iterator[Run]:
        """The runs that can be planned with what is known."""

    def least_runs(self, known: Known) -> Iterator[Run]:
        """As many runs as there will be at least."""

    def write(self, known: Known, folder: Path) -> None:
        """Write the page and the figure."""


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The options that all drivers have."""
    add = parser.add_argument
    add("--processes", type=int, default=1, help="runs at the same time, each with one thread (%(default)s)")
    add("--output", type=Path, default=Path(output), help="folder of results and logs (%(default)s)")
    add("--report", type=Path, help="folder for pages, figures and results (default: report in the output folder)")
    add("--plan", action="store_true", help="only print what is left to run, and about how long it takes")
    add("--write-only", action="store_true", help="only write pages and figures of the results there are")
    add("--retry", action="store_true", help="run what has failed before once more")


def drive(
    experiments: Mapping[str, Experiment],
    source: Source,
    args: argparse.Namespace,
    seconds: Callable[[Run, Known], float],
    preload: Sequence[str],
) -> None:
    """Plan, run and write.

    Args:
        experiments: By name, in their order.
        source: The model and the data.
        args: With the options of `add_arguments`.
        seconds: How long a run takes, about, with what is known.
        preload: Modules that the runs need.
    """
    results = Results(args.output / "results.jsonl")
    if args.plan:
        print_plan(experiments, source, results.read(), args.processes, seconds)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.write_only:
        try:
            with locked(args.output / "driver.lock", wait=False):
                pool = Pool(source, args.output, args.processes, preload, args.retry)
                pool.work(lambda: (run for each in experiments.values() for run in each.runs(results.read())))
        except BlockingIOError:
            raise SystemExit(f"Another driver is at work in {args.output}.") from None
    report = args.report or args.output / "report"
    report.mkdir(parents=True, exist_ok=True)
    for experiment in experiments.values():
        experiment.write(results.read(), report)
    if results.file.exists() and report != args.output:
        shutil.copy(results.file, report)  # so that pages can be written again, with --write-only
    print(f"The pages and figures are in {report}.")


def print_plan(
    experiments: Mapping[str, Experiment],
    source: Source,
    known: Known,
    processes: int,
    seconds: Callable[[Run, Known], float],
) -> None:
    """What is left to run: at least so much, as the search for a learning rate may go on."""
    left: dict[Run, float] = {}
    for name, experiment in experiments.items():
        runs = dict.fromkeys(experiment.least_runs(known))
        new = [run for run in runs if run.command(source) not in known and run not in left]
        left |= {run: seconds(run, known) for run in new}
        hours = sum(left[run] for run in new) / 3600
        print(f"{name}: {len(runs)} runs, {len(new)} left, {hours:.1f} process hours")
    for run in left:
        print(f"  {run.command(source)}")
    print(f"{len(left)} runs, about {sum(left.values()) / 60 / processes:.0f} minutes in {processes} processes")
