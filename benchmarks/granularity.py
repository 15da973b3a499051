"""The part of the page on benchmarks about input channels."""

from collections.abc import Mapping
from typing import Any

from benchmarks.measure import ratio, total
from benchmarks.peers import STEP
from benchmarks.tables import made_with, ms, table


METHODS = {
    "full": "full fine-tuning",
    "lora": "PEFT LoRA, r = 8",
    "random": "single entries",
    "channels": "**input channels**",
}


def by_granularity(results: Mapping[str, Any]) -> str:
    """The tables."""
    text = (
        "A density of 0.1, chosen at random: a step costs the same for all child networks of a size. Ratios are "
        "medians of those within a turn. Peak memory is that of training in the largest batch, above the base model."
    )
    return "\n\n".join(["## Input channels", made_with(results), text, *map(of_model, results["cases"])])


def of_model(case: Mapping[str, Any]) -> str:
    """The tables of one model."""
    rows = []
    for batch, seconds in case["steps"].items():
        steps = {method: total(own, STEP) for method, own in seconds.items()}
        for method, name in METHODS.items():
            inference = seconds[method]["inference"]
            rows.append(
                [
                    f"{batch}: {name}",
                    ms(steps[method]),
                    f"{ratio(steps[method], steps['full']):.2f}",
                    f"{ratio(steps[method], steps['lora']):.2f}",
                    f"{ratio(inference, seconds['full']['inference']):.2f}",
                    f"{case['memory'][method] / 1e6:.0f}" if batch == list(case["steps"])[-1] else "",
                ]
            )
    fisher = case["fisher"]
    channels, entries = (ratio(fisher[who]["pass"], fisher["plain"]["pass"]) for who in ("channels", "entries"))
    line = (
        f"A Fisher pass takes {channels:.2f} of a forward and backward pass that computes the gradient of the "
        f"embeddings alone; that of single entries {entries:.2f}. (24 examples in batches of 8.)"
    )
    head = ["tokens, method", "step, ms", "to full", "to LoRA", "inference, to the base", "peak MB"]
    return "\n\n".join([f"### {case['model']}, by granularity", table(head, rows), line])
