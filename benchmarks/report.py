"""Results as Markdown: `docs/benchmarks.md` is written from `docs/benchmarks.json`, whatever part of it is new."""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.fits import growth
from benchmarks.granularity import by_granularity
from benchmarks.measure import Turns, machine, ratio, total
from benchmarks.peers import METHODS, STEP
from benchmarks.tables import made_with, ms, table


Case = Mapping[str, Any]
PASSES = STEP[:2]


class Goal(NamedTuple):
    """A ratio to be reached.

    Attributes:
        text: What it is about.
        bound: The wanted number.
        at_most: Whether the ratio is to be below it, else above.
        found: From the results of one model, a number for each batch, or just one.
    """

    text: str
    bound: float
    at_most: bool
    found: Callable[[Case], list[float]]

    def cell(self, case: Case) -> str:
        """The figures, those in bold that miss the goal."""
        numbers = [round(number, 2) for number in self.found(case)]
        missed = [number > self.bound if self.at_most else number < self.bound for number in numbers]
        return ", ".join(
            f"**{number:.2f}**" if miss else f"{number:.2f}" for number, miss in zip(numbers, missed, strict=True)
        )


def step_ratio(other: str, phases: Sequence[str] = STEP) -> Callable[[Case], list[float]]:
    """Ratios of CT_D's step to another method's, by batch."""
    return lambda case: [
        ratio(total(seconds["task_driven"], phases), total(seconds[other], phases))
        for seconds in case["steps"].values()
    ]


def inference_ratio(phase: str) -> Callable[[Case], list[float]]:
    """Ratios of CT_D's inference to the base model's, by batch."""
    return lambda case: [
        ratio(seconds["task_driven"][phase], seconds["native"]["inference"])
        for seconds in case["steps"].values()
        if phase in seconds["task_driven"]
    ]


def within(part: str, phase: str, other: str) -> Callable[[Case], list[float]]:
    """Ratio of two phases of CT_D."""
    return lambda case: [ratio(case[part]["task_driven"][phase], case[part]["task_driven"][other])]


def times_faster(part: str, phase: str) -> Callable[[Case], list[float]]:
    """How much longer the authors' way takes."""
    return lambda case: [ratio(case[part]["peer"][phase], case[part]["ours"][phase])]


GOALS = (
    Goal("training step, to full fine-tuning", 0.85, True, step_ratio("full")),
    Goal("training step, to PEFT SHiRA", 0.75, True, step_ratio("shira")),
    Goal("training step, to PEFT LoRA, r = 8", 1.30, True, step_ratio("lora")),
    Goal("forward and backward, to native ones", 1.08, True, step_ratio("native", PASSES)),
    Goal("inference with the adapter, to the base", 1.15, True, inference_ratio("inference")),
    Goal("merged inference, to the base", 1.00, True, inference_ratio("merged inference")),
    Goal("loading, to a copy of the file", 3, True, within("files", "load", "file copy")),
    Goal(
        "switching merged adapters, to a copy of the child", 3, True, within("files", "merged switch", "memory copy")
    ),
    Goal("Fisher pass of the authors' loop, to ours", 2.5, False, times_faster("fisher", "pass")),
    Goal("choice by `numpy.percentile`, to ours", 20, False, times_faster("choice", "choice")),
    Goal(
        "memory of a choice besides scores and result, MB",
        64,
        True,
        lambda case: [case["choice memory"]["ours"] / 1e6],
    ),
)


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of every part."""
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="default: all cores")
    parser.add_argument("--output", type=Path, help="folder for benchmarks.md and benchmarks.json")


def carry_out(part: str, module: str, args: Namespace, work: Callable[[], Mapping[str, Any]]) -> None:
    """Measure a part, print it, and write it if asked to."""
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    facts, start = machine(), time.time()
    command = " ".join([f"python -m {module}", *sys.argv[1:]])
    results = {"machine": facts, "command": command, **work(), "seconds": time.time() - start}
    print(PARTS[part](results))
    if args.output:
        write(args.output, part, results)


def write(folder: Path, part: str, results: Mapping[str, Any]) -> None:
    """Put new results into the files of a folder; the other part of them stays as it was."""
    file = folder / "benchmarks.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    stored[part] = results
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
    (folder / "benchmarks.md").write_text(page(stored))


def page(stored: Mapping[str, Any]) -> str:
    """The whole page."""
    text = (Path(__file__).parent / "about.md").read_text().strip()
    return "\n\n".join([text, *(render(stored[part]) for part, render in PARTS.items() if part in stored)]) + "\n"


def peers(results: Mapping[str, Any]) -> str:
    """All methods side by side."""
    cases = results["cases"]
    goals = [[goal.text, f"{'<=' if goal.at_most else '>='} {goal.bound:g}", *map(goal.cell, cases)] for goal in GOALS]
    many = f"{results['many']['seconds']:.1f}"
    goals.append([f"choice from {results['many']['scores']:,} scores, s", "<= 20", *[many] * len(cases)])
    names = [f"{case['model']} ({', '.join(case['steps'])})" for case in cases]
    return "\n\n".join(
        ["## Beside other methods", made_with(results), table(["CT_D", "goal", *names], goals), *map(of_model, cases)]
    )


def of_model(case: Case) -> str:
    """The tables of one model."""
    about = f"{case['weights']:,} weights, {case['targeted']:,} of them targeted."
    steps = [
        f"Batches of {batch} tokens; milliseconds, and ratios to full fine-tuning and to inference of the base:\n\n"
        f"{steps_table(case, seconds)}"
        for batch, seconds in case["steps"].items()
    ]
    return "\n\n".join([f"### {case['model']}", about, *steps, files_table(case), choosing(case)])


def steps_table(case: Case, seconds: Turns) -> str:
    """Steps; beside those of the first batch what is measured with it alone."""
    rows = []
    for method, own in seconds.items():
        phases = [phase for phase in STEP if phase in own]
        row = [METHODS[method], *(ms(own.get(phase)) for phase in STEP), ms(total(own, phases))]
        row.append(f"{ratio(total(own, phases), total(seconds['full'], STEP)):.2f}")
        rows.append([*row, *more_about(method, case, seconds)])
    head = ["", "forward", "backward", "optimizer", "step", "ratio"]
    more = ["inference", "ratio", "merge", "unmerge", "merged inf., ratio", "trained values", "peak MB", "ratio"]
    return table([*head, *more][: len(rows[0])], rows)


def more_about(method: str, case: Case, seconds: Turns) -> list[str]:
    """Inference, merging and memory."""
    own, base = seconds[method], seconds["native"].get("inference")
    if base is None:
        return []
    return [
        ms(own["inference"]),
        f"{ratio(own['inference'], base):.2f}",
        ms(own.get("merge")),
        ms(own.get("unmerge")),
        f"{ratio(own['merged inference'], base):.2f}" if "merge" in own else "",
        f"{case['trained'][method]:,}",
        f"{case['memory'][method] / 1e6:.0f}",
        f"{case['memory'][method] / case['memory']['full']:.2f}",
    ]


def files_table(case: Case) -> str:
    """Files and switching."""
    phases = ("save", "load", "file copy", "switch", "merged switch", "memory copy")
    rows = [
        [METHODS[method], f"{case['file sizes'][method] / 1e6:.1f}", *(ms(own.get(phase)) for phase in phases)]
        for method, own in case["files"].items()
    ]
    return "Files; milliseconds:\n\n" + table(["", "MB", *phases], rows)


def choosing(case: Case) -> str:
    """Fisher pass and choice."""
    rows = [
        [
            name,
            ms(case["fisher"][who]["pass"]),
            ms(case["choice"][who]["choice"]),
            f"{case['choice memory'][who] / 1e6:.0f}",
            f"{case['memory'][peak] / 1e6:.0f}",
        ]
        for name, who, peak in (
            ("**Child-Tuning**", "ours", "choosing"),
            ("authors' loop, `numpy.percentile`", "peer", "choosing, authors"),
        )
    ]
    head = ["", "Fisher pass", "choice", "MB of a choice besides its result", "peak MB of both above the base"]
    return "Choosing the child network from 24 examples in batches of 8; milliseconds:\n\n" + table(head, rows)


PARTS: dict[str, Callable[[Mapping[str, Any]], str]] = {  # and how they are written
    "channels": by_granularity,
    "peers": peers,
    "growth": growth,
}
