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
    head = ["tokens, method", "step, ms", "to full", "to LoRA", "inference, to the base", "peak MB"]
    return "\n\n".join([f"### {case['model']}, by granularity", table(head, rows), choosing(case), loading(case)])


def choosing(case: Mapping[str, Any]) -> str:
    """Time and memory of the Fisher pass."""
    seconds, peaks = case["fisher"], case["fisher memory"]
    rows = []
    for who, name in {"entry": "single entries", "input_channel": "**input channels**"}.items():
        times = [ratio(seconds[who]["pass"], seconds[other]["pass"]) for other in ("trained", "frozen")]
        beyond = max(0, peaks[who] - peaks["trained"])
        rows.append([name, *(f"{time:.2f}" for time in times), f"{beyond / 1e6:.1f}", f"{beyond / case['bytes']:.1%}"])
    head = ["Fisher pass", "time, to a pass", "to one of a frozen model", "MB beyond the pass", "of the weights"]
    text = (
        "A pass goes forward and backward over the same 32 examples in batches of 8; it computes the gradients of all "
        "weights, each of which is dropped at once, or, in a frozen model, those of the embeddings alone."
    )
    return f"{table(head, rows)}\n\n{text}"


def loading(case: Mapping[str, Any]) -> str:
    """Time of loading an adapter."""
    seconds = {method: found["load"] for method, found in case["loading"].items()}
    entries, channels = (ratio(seconds[method], seconds["lora_same"]) for method in ("random", "channels"))
    return (
        f"Loading channels takes {channels:.2f} times as long as loading a LoRA adapter with as many values "
        f"({ms(seconds['lora_same'])} ms), and loading random entries {entries:.2f} times as long."
    )
