"""How time and memory of each phase grow with the model, the density and the batch.

    python -m benchmarks.growth [--quick] [--output docs]

The models are Llamas of up to 300 million weights. Beside each stands the native model: the base with gradients for
the targeted weights.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.cases import on_device, peak_of_base, peak_of_choosing, peak_of_training
from benchmarks.measure import DEVICE, in_fresh_process, peak_memory, say, take_turns, total
from benchmarks.peers import Peer
from benchmarks.report import add_arguments, carry_out
from benchmarks.shapes import Shape, batch_of, build, in_parts, llama, targeted
from peft_child import estimate_fisher
from peft_child.layers.layer import child_tuning_layers
from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.topk import select_largest


SIZES = [llama(10, 288), llama(12, 448), llama(14, 768), llama(24, 1024)]  # 10, 30, 100 and 300 million weights
DENSITIES = [0.01, 0.03, 0.1, 0.3]
LENGTH = 32
BATCHES = [2, 8, 32, 64]  # sequences


def measure_point(shape: Shape, density: float, batch_size: int, turns: int, method: str = "random") -> dict[str, Any]:
    """Seconds of every turn by phase for one model, density, batch and method, 'random' or 'channels'."""
    say(f"{shape}, {method}, density {density}, {batch_size} x {LENGTH} tokens")
    batch = on_device(batch_of(shape, batch_size, LENGTH))
    with tempfile.TemporaryDirectory() as temporary:
        native, ours = (Peer(shape, who, density, Path(temporary)) for who in ("native", method))
        numel = sum(parameter.numel() for parameter in native.model.parameters())
        size = sum(parameter.numel() for parameter in ours.trained)
        work = {
            "native": {**native.training(batch), **native.inference(batch)},
            "ours": {
                **ours.training(batch),
                **ours.inference(batch),
                **choosing(ours, batch_of(shape, 2, LENGTH), size),
                **adding(ours),
                **ours.merging(batch),
                **ours.filing(Path(temporary)),
            },
        }
        seconds = take_turns(work, turns)
    passes = {f"pass, {who}": total(found, ("forward", "backward")) for who, found in seconds.items()}
    return {
        "weights": numel,
        "targeted": sum(parameter.numel() for _, parameter in targeted(native.model)),
        "chosen": size,
        "density": density,
        "tokens": batch_size * LENGTH,
        "seconds": {**passes, "inference, native": seconds["native"]["inference"], **seconds["ours"]},
    }


def choosing(peer: Peer, batch: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """The Fisher pass of two examples, one at a time, and the choice."""
    scores: dict[str, Tensor] = {}
    layouts: dict[str, ChannelLayout] = {}
    if peer.method == "channels":
        for layer in child_tuning_layers(peer.model).values():
            layouts |= layer.layouts("default")
    choose = partial(choose_channels, scores, layouts, size) if layouts else partial(select_largest, scores, size)
    return {
        "Fisher pass": lambda: scores.update(estimate_fisher(peer.model, in_parts(batch, 1), progress_bar=False)),
        "choice": choose,
        "_forget": scores.clear,
    }


def adding(peer: Peer) -> dict[str, Any]:
    """Adding another adapter to the model."""
    config = replace(peer.model.peft_config["default"])
    return {
        "add an adapter": partial(peer.model.add_adapter, "added", config),
        "_delete it": partial(peer.model.delete_adapter, "added"),
    }


def measure_peaks(shape: Shape, density: float, method: str = "random") -> dict[str, int]:
    """Peak memory above the base model, each in a fresh process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, batch = Path(temporary) / "chosen", (2, LENGTH)
        granularity = "input_channel" if method == "channels" else "entry"
        base = in_fresh_process(peak_of_base, shape)
        peaks = {
            "training": in_fresh_process(peak_of_training, shape, method, density, batch, folder),
            "choosing": in_fresh_process(peak_of_choosing, shape, density, batch, folder, granularity),
            "loading": in_fresh_process(peak_of_loading, shape, folder, False),
            "loading and merging": in_fresh_process(peak_of_loading, shape, folder, True),
        }
    return {phase: peak - base for phase, peak in peaks.items()}


def peak_of_loading(shape: Shape, folder: Path, merge: bool) -> int:
    """Peak memory of loading an adapter, and of merging it or one pass with it."""
    model = PeftModel.from_pretrained(build(shape).to(DEVICE), folder)
    if merge:
        model.merge_adapter()
    else:
        with torch.inference_mode():
            model(**on_device(batch_of(shape, 2, LENGTH)))
    return peak_memory()


def measured(shapes: list[Shape], turns: int, some: int | None) -> dict[str, Any]:
    """Every model with both granularities; then one of them at some or all densities and batches."""
    return {
        "turns": turns,
        "size": [{**measure_point(shape, 0.1, 2, turns), "peaks": measure_peaks(shape, 0.1)} for shape in shapes],
        "size, channels": [
            {**measure_point(shape, 0.1, 2, turns, "channels"), "peaks": measure_peaks(shape, 0.1, "channels")}
            for shape in shapes
        ],
        "density": [measure_point(shapes[1], density, 2, turns) for density in DENSITIES[:some]],
        "batch": [measure_point(shapes[1], 0.1, batch, turns) for batch in BATCHES[:some]],
    }


def main() -> None:
    """Measure, fit, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="measure so many models, the smallest ones")
    parser.add_argument("--turns", type=int, default=7, help="measured turns")
    add_arguments(parser)
    args = parser.parse_args()
    shapes = [llama(layers, 64) for layers in (1, 2, 3)] if args.quick else SIZES[: args.sizes]
    some = 2 if args.quick else None
    carry_out("growth", "benchmarks.growth", args, lambda: measured(shapes, args.turns, some))


if __name__ == "__main__":
    main()
