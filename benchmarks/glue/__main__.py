"""Run experiments, as many processes at a time as are told, and write their pages and figures.

    python -m benchmarks.glue main --plan
    python -m benchmarks.glue main ablations --model bert-base-cased --processes 2

A driver that was stopped goes on where it was when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks.glue.experiments import EXPERIMENTS, Experiment, Settings
from benchmarks.glue.grid import Known, estimated_seconds
from benchmarks.glue.pool import Pool
from benchmarks.glue.runs import Results, Run, Source, locked


FULL = {"tasks": ["cola", "mrpc", "stsb", "rte"], "seeds": 10, "max_train_examples": 0}


def parse_arguments() -> argparse.Namespace:
    """The command line; `--full` changes defaults, so that the other flags still count."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.glue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiments", nargs="+", choices=EXPERIMENTS, help="what to run and write, in this order")
    add("--model", default="bert-base-cased", help="model on the Hub or local folder (%(default)s)")
    add("--data", help="folder with TASK/train.jsonl and TASK/validation.jsonl instead of the Hub")
    add("--tasks", nargs="+", default=["cola", "mrpc", "stsb"], help="tasks (%(default)s)")
    add("--methods", nargs="+", default=[], help="only these methods of the tables, by name")
    add("--seeds", type=int, default=5, help="seeds for each cell (%(default)s)")
    add("--max-train-examples", type=int, default=1000, help="training rows of a run, 0 for all (%(default)s)")
    add("--epochs", type=float, default=3, help="passes over them (%(default)s)")
    add("--full", action="store_true", help="larger defaults, for a GPU: all rows, more tasks, methods and seeds")
    add("--processes", type=int, default=1, help="runs at the same time, each with one thread (%(default)s)")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder of results and logs (%(default)s)")
    add("--report", type=Path, help="folder for pages, figures and results (default: report in the output folder)")
    add("--plan", action="store_true", help="only print what is left to run, and about how long it takes")
    add("--write-only", action="store_true", help="only write pages and figures of the results there are")
    add("--retry", action="store_true", help="run what has failed before once more")
    add("--seconds-per-step", type=float, default=0.45, help="for a plan without results (%(default)s)")
    if parser.parse_args().full:
        parser.set_defaults(**FULL)
    return parser.parse_args()


def print_plan(experiments: list[Experiment], known: Known, args: argparse.Namespace, source: Source) -> None:
    """What is left to run: at least so much, as the search for a learning rate may go on."""
    left: dict[Run, float] = {}
    for name, experiment in zip(args.experiments, experiments, strict=True):
        runs = dict.fromkeys(experiment.least_runs(known))
        new = [run for run in runs if run.command(source) not in known and run not in left]
        left |= {run: estimated_seconds(run, source, known, args.seconds_per_step) for run in new}
        searches = sum("--hold-out" in run.options for run in new)
        hours = sum(left[run] for run in new) / 3600
        print(f"{name}: {len(runs)} runs, {len(new)} left ({searches} of the search), {hours:.1f} process hours")
    for run in left:
        print(f"  {run.command(source)}")
    print(
        f"{len(left)} runs, about {sum(left.values()) / 60 / args.processes:.0f} minutes in {args.processes} processes"
    )


def main() -> None:
    """Plan, run and write."""
    args = parse_arguments()
    source = Source(args.model, args.data)
    settings = Settings(
        source, tuple(args.tasks), args.seeds, args.max_train_examples, args.epochs, args.full, tuple(args.methods)
    )
    experiments: list[Experiment] = [EXPERIMENTS[name](settings) for name in args.experiments]
    results = Results(args.output / "results.jsonl")
    if args.plan:
        print_plan(experiments, results.read(), args, source)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.write_only:
        try:
            with locked(args.output / "driver.lock", wait=False):
                pool = Pool(source, args.output, args.processes, args.retry)
                pool.work(lambda: (run for experiment in experiments for run in experiment.runs(results.read())))
        except BlockingIOError:
            raise SystemExit(f"Another driver is at work in {args.output}.") from None
    report = args.report or args.output / "report"
    report.mkdir(parents=True, exist_ok=True)
    for experiment in experiments:
        experiment.write(results.read(), report)
    if results.file.exists() and report != args.output:
        shutil.copy(results.file, report)  # so that pages can be written again, with --write-only
    print(f"The pages and figures are in {report}.")


if __name__ == "__main__":
    main()
