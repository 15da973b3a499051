"""Run experiments, as many processes at a time as are told, and write their pages and figures.

    python -m benchmarks.glue main --plan
    python -m benchmarks.glue main ablations --model bert-base-cased --processes 2

A driver that was stopped goes on where it was when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.glue.experiments import EXPERIMENTS, Settings
from benchmarks.glue.grid import estimated_seconds
from benchmarks.grid.driver import add_arguments, drive
from benchmarks.grid.runs import Source


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
    add_arguments(parser, "runs/benchmark")
    add("--seconds-per-step", type=float, default=0.45, help="for a plan without results (%(default)s)")
    if parser.parse_args().full:
        parser.set_defaults(**FULL)
    return parser.parse_args()


def main() -> None:
    """Plan, run and write."""
    args = parse_arguments()
    source = Source(args.model, args.data)
    settings = Settings(
        source, tuple(args.tasks), args.seeds, args.max_train_examples, args.epochs, args.full, tuple(args.methods)
    )
    experiments = {name: EXPERIMENTS[name](settings) for name in args.experiments}
    preload = ["benchmarks.glue.variants", "benchmarks.glue.forgetting"]
    drive(experiments, source, args, partial(estimated_seconds, source, args.seconds_per_step), preload)


if __name__ == "__main__":
    main()
