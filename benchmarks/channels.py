"""Input channels beside full fine-tuning, LoRA and single entries: steps, inference, memory, choice and loading.

python -m benchmarks.channels [--quick] [--output docs]
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import TOGETHER, on_device, peak_of_base, peak_of_training, task_driven
from benchmarks.granularity import METHODS
from benchmarks.measure import DEVICE, in_fresh_process, peak_memory, say, take_turns
from benchmarks.peers import Peer
from benchmarks.report import add_arguments, carry_out
from benchmarks.shapes import SHAPES, Shape, batch_of, build, in_parts
from peft_child import estimate_fisher


MODELS = {"encoder": [(8, 64), (16, 128)], "minilm": [(8, 64), (16, 128)], "llama": [(8, 64), (16, 128)]}
QUICK = {"tiny encoder": [(2, 8), (4, 8)]}
DENSITY = 0.1
PASSES = ("entry", "input_channel", "frozen", "trained")  # the Fisher pass; a pass without, or with all gradients
EXAMPLES = 32


def measure(name: str, batches: list[tuple[int, int]], turns: int) -> dict[str, Any]:
    """Everything about one model; times are seconds of every turn, memory is bytes above the base model."""
    shape = SHAPES[name]
    say(f"{name}: memory of {batches[-1]}")
    base = in_fresh_process(peak_of_base, shape)
    memory = {
        method: in_fresh_process(peak_of_training, shape, method, DENSITY, batches[-1], None) - base
        for method in METHODS
    }
    peers = {method: Peer(shape, method, DENSITY, None) for method in METHODS}
    steps = {}
    for size, length in batches:
        say(f"{name}: steps of {size} x {length} tokens")
        batch = on_device(batch_of(shape, size, length))
        work = {method: {**peer.training(batch), **peer.inference(batch)} for method, peer in peers.items()}
        steps[f"{size} x {length}"] = take_turns(work, turns)
    peers.clear()
    length = batches[0][1]
    say(f"{name}: Fisher pass")
    fisher = measure_fisher(shape, length, turns)
    peaks = {who: in_fresh_process(peak_of_pass, shape, length, who) - base for who in PASSES}
    say(f"{name}: loading")
    return {
        "model": name,
        "memory": memory,
        "steps": steps,
        "fisher": fisher,
        "fisher memory": peaks,
        "bytes": sum(parameter.nbytes for parameter in build(shape).parameters()),
        "loading": measure_loading(shape, turns),
    }


def measure_fisher(shape: Shape, length: int, turns: int) -> Any:
    """The Fisher pass of both granularities, beside forward and backward passes over the same batches."""
    return take_turns({who: {"pass": prepared_pass(shape, length, who)} for who in PASSES}, turns)


def peak_of_pass(shape: Shape, length: int, who: str) -> int:
    """Peak memory of a pass."""
    prepared_pass(SHAPES["tiny encoder"], length, who)()  # loads code, which takes memory as well
    prepared_pass(shape, length, who)()
    return peak_memory()


def prepared_pass(shape: Shape, length: int, who: str) -> Callable[[], object]:
    """One of `PASSES` over some batches."""
    batches = in_parts(batch_of(shape, EXAMPLES, length), TOGETHER)
    if who in ("entry", "input_channel"):
        return partial(estimate_fisher, task_driven(shape, DENSITY, who), batches, progress_bar=False)
    model = build(shape).to(DEVICE).eval()
    if who == "frozen":  # all but the embeddings, without which there would be no graph
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    return partial(forward_and_backward, model, batches)


def drop_gradient(parameter: torch.Tensor) -> None:
    """A gradient that is computed, and not kept."""
    parameter.grad = None


def forward_and_backward(model: nn.Module, batches: list[Any]) -> None:
    """A forward and a backward pass for each batch."""
    for batch in batches:
        model(**on_device(batch)).loss.backward()


def measure_loading(shape: Shape, turns: int) -> Any:
    """Loading an adapter into a model that has one, and decoding it."""
    with tempfile.TemporaryDirectory() as temporary:
        work = {}
        for method in ("lora_same", "random", "channels"):
            phases = Peer(shape, method, DENSITY, None).filing(Path(temporary) / method)
            phases["save"]()
            work[method] = {phase: phases[phase] for phase in ("load", "_delete")}
        return take_turns(work, turns)


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--turns", type=int, default=7, help="measured turns")
    add_arguments(parser)
    args = parser.parse_args()
    models = QUICK if args.quick else MODELS

    def work() -> dict[str, Any]:
        cases = [measure(name, batches, args.turns) for name, batches in models.items()]
        return {"turns": args.turns, "cases": cases}

    carry_out("channels", "benchmarks.channels", args, work)


if __name__ == "__main__":
    main()
