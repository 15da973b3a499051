"""Child-Tuning beside full fine-tuning, the authors' method, gradient hooks, and PEFT's SHiRA and LoRA, in one run.

    python -m benchmarks.run [--quick | --long] [--output docs]

On a CUDA device if there is one, else the CPU. `--quick` only shows that everything runs.
"""

import argparse
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.cases import Plan, measure, measure_many_scores
from benchmarks.measure import machine, say
from benchmarks.report import peers, write


FEW, USUAL, MANY = (4, 64), (8, 64), (16, 128)
PLANS = {
    "quick": Plan(3, {"tiny encoder": [(2, 8), (4, 8)], "tiny llama": [(2, 8)]}),
    "default": Plan(7, {"encoder": [USUAL, MANY], "minilm": [USUAL, MANY], "llama": [FEW]}),
    "long": Plan(15, {"encoder": [USUAL, MANY], "minilm": [USUAL, MANY], "llama": [USUAL, MANY]}, all_methods=True),
}


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_const", dest="plan", const="quick", help="tiny models")
    extent.add_argument("--long", action="store_const", dest="plan", const="long", help="all methods, more turns")
    parser.add_argument("--models", nargs="+", help="some of the models")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="default: all cores")
    parser.add_argument("--output", type=Path, help="folder for benchmarks.md and benchmarks.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    name = args.plan or "default"
    plan, facts, start = PLANS[name], machine(), time.time()
    scores = 10**7 if name == "quick" else 10**9
    cases = [measure(model, plan) for model in args.models or plan.batches]
    say(f"choice from {scores:,} scores")
    results = {
        "machine": facts,
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "turns": plan.turns,
        "cases": cases,
        "many": {"scores": scores, "seconds": measure_many_scores(scores, plan.density)},
        "seconds": time.time() - start,
    }
    print(peers(results))
    if args.output:
        write(args.output, "peers", results)


if __name__ == "__main__":
    main()
