"""Child-Tuning beside full fine-tuning, the authors' method, gradient hooks, and PEFT's SHiRA and LoRA, in one run.

    python -m benchmarks.run [--quick | --long] [--output docs]

On a CUDA device if there is one, else the CPU. `--quick` only shows that everything runs.
"""

import argparse
from typing import Any

from benchmarks.cases import Plan, measure, measure_many_scores
from benchmarks.measure import say
from benchmarks.report import add_arguments, carry_out


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
    add_arguments(parser)
    args = parser.parse_args()
    name = args.plan or "default"
    plan = PLANS[name]
    scores = 10**7 if name == "quick" else 10**9
    carry_out("peers", "benchmarks.run", args, lambda: measured(plan, args.models or list(plan.batches), scores))


def measured(plan: Plan, models: list[str], scores: int) -> dict[str, Any]:
    """All methods on each model, and the choice from many scores."""
    cases = [measure(model, plan) for model in models]
    say(f"choice from {scores:,} scores")
    many = {"scores": scores, "seconds": measure_many_scores(scores, plan.density)}
    return {"turns": plan.turns, "cases": cases, "many": many}


if __name__ == "__main__":
    main()
