"""Input channels beside full fine-tuning, LoRA and single entries: steps, inference, memory and the Fisher pass.

python -m benchmarks.channels [--quick] [--output docs]
"""

import argparse
from typing import Any

from torch import nn

from benchmarks.cases import EXAMPLES, TOGETHER, on_device, peak_of_base, peak_of_training, task_driven
from benchmarks.granularity import METHODS
from benchmarks.measure import DEVICE, in_fresh_process, say, take_turns
from benchmarks.peers import Peer
from benchmarks.report import add_arguments, carry_out
from benchmarks.shapes import SHAPES, Shape, batch_of, build, in_parts
from peft_child import estimate_fisher


MODELS = {"encoder": [(8, 64), (16, 128)], "minilm": [(8, 64), (16, 128)], "llama": [(8, 64), (16, 128)]}
QUICK = {"tiny encoder": [(2, 8), (4, 8)]}
DENSITY = 0.1


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
    say(f"{name}: Fisher pass")
    return {"model": name, "memory": memory, "steps": steps, "fisher": measure_fisher(shape, batches[0][1], turns)}


def measure_fisher(shape: Shape, length: int, turns: int) -> Any:
    """The Fisher pass of both granularities, and a pass that computes the gradient of the embeddings alone."""
    entries, channels = (task_driven(shape, DENSITY, granularity) for granularity in ("entry", "input_channel"))
    plain = build(shape).to(DEVICE).eval()
    batches = in_parts(batch_of(shape, EXAMPLES, length), TOGETHER)
    work = {
        "entries": {"pass": lambda: estimate_fisher(entries, batches, progress_bar=False)},
        "channels": {"pass": lambda: estimate_fisher(channels, batches, progress_bar=False)},
        "plain": {"pass": lambda: forward_and_backward(plain, batches)},
    }
    return take_turns(work, turns)


def forward_and_backward(model: nn.Module, batches: list[Any]) -> None:
    """What a pass over some batches takes without the gradient of any linear weight."""
    model.requires_grad_(False)
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.requires_grad_(True)
    for batch in batches:
        model(**on_device(batch)).loss.backward()
    model.zero_grad()


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
