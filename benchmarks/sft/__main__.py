"""Run experiments, as many processes at a time as are told, and write their pages and figures.

    python -m benchmarks.sft sft --plan
    python -m benchmarks.sft sft gsm8k --model my-model --data folder --processes 2

The folder of the data has e2e/train.jsonl, e2e/test.jsonl and the same for gsm8k; without it they come from the Hub. A
driver that was stopped goes on where it was when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
from statistics import median

from benchmarks.grid.driver import add_arguments, drive
from benchmarks.grid.runs import Known, Run, Source
from benchmarks.sft.experiments import EXPERIMENTS, Settings


CPU = ("--held-out", "64", "--held-out-old", "8", "--attention", "eager", "--bf16")
GPU = ("--bf16",)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--gpu` changes defaults, so that the other flags still count."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiments", nargs="+", choices=EXPERIMENTS, help="what to run and write, in this order")
    add(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model on the Hub or local folder (%(default)s)"
    )
    add("--data", help="folder with TASK/train.jsonl and TASK/test.jsonl instead of the Hub")
    add("--methods", nargs="+", default=[], help="only these methods of the tables, by name")
    add("--seeds", type=int, default=2, help="for each method at its best rate (%(default)s)")
    add("--steps", type=int, default=100, help="training steps (%(default)s)")
    add("--batch-size", type=int, default=4, help="rows in a training step (%(default)s)")
    add("--gpu", action="store_true", help="a larger model, more steps, rows and held-out rows, for a GPU")
    add_arguments(parser, "runs/sft_benchmark")
    add("--seconds-per-step", type=float, default=2.5, help="for a plan without results (%(default)s)")
    if parser.parse_args().gpu:
        parser.set_defaults(model="HuggingFaceTB/SmolLM2-1.7B-Instruct", steps=400, batch_size=8, seeds=3)
    return parser.parse_args()


def main() -> None:
    """Plan, run and write."""
    args = parse_arguments()
    source = Source(args.model, args.data)
    settings = Settings(source, args.seeds, args.steps, args.batch_size, tuple(args.methods), GPU if args.gpu else CPU)

    def seconds(run: Run, known: Known) -> float:
        alike = [result["seconds"] for result in known.values() if result.get("method") == run.option("--method")]
        return median(alike) if alike else args.seconds_per_step * args.steps

    experiments = {name: EXPERIMENTS[name](settings) for name in args.experiments}
    drive(
        experiments,
        source,
        args,
        seconds,
        ["benchmarks.sft.variants", "benchmarks.sft.combine", "benchmarks.sft.steps"],
    )


if __name__ == "__main__":
    main()
