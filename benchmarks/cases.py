"""What is measured on one model: steps, inference, merging, memory, files, Fisher pass and choice."""

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks import authors
from benchmarks.measure import DEVICE, Turns, in_fresh_process, peak_memory, say, take_turns, timed
from benchmarks.peers import ADAPTERS, METHODS, Peer, weights_file
from benchmarks.shapes import SHAPES, Shape, batch_of, build, in_parts, targeted
from peft_child import ChildTuningConfig, estimate_fisher, select_child_network
from peft_child.tensors.topk import select_largest


EXAMPLES, TOGETHER = 24, 8  # of a Fisher pass, and in a batch
SOME = ("native", "full", "shira", "lora", "task_driven", "channels")  # what larger batches are measured with


class Plan(NamedTuple):
    """How much to measure.

    Attributes:
        turns: Measured turns.
        batches: By model its batches, sequences and their length; all methods run on the first one.
        density: Share of the targeted weights in the child network.
        all_methods: Run all methods on the other batches as well.
    """

    turns: int
    batches: Mapping[str, list[tuple[int, int]]]
    density: float = 0.1
    all_methods: bool = False


def measure(name: str, plan: Plan) -> dict[str, Any]:
    """Everything about one model; times are seconds of every turn, sizes bytes."""
    shape, batches = SHAPES[name], plan.batches[name]
    model = build(shape)
    sizes = {
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "targeted": sum(parameter.numel() for _, parameter in targeted(model)),
    }
    del model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"{name}: memory")
        memory = measure_memory(shape, plan.density, batches[0], folder / "chosen")
        peers = {method: Peer(shape, method, plan.density, folder / "chosen") for method in METHODS}
        steps = {}
        for size, length in batches:
            say(f"{name}: steps of {size} x {length} tokens")
            batch = on_device(batch_of(shape, size, length))
            steps[f"{size} x {length}"] = measure_steps(peers, batch, plan.turns, not steps, plan.all_methods)
        say(f"{name}: files")
        files, file_sizes = measure_files(peers, plan.turns, folder)
        trained = {method: sum(parameter.numel() for parameter in peer.trained) for method, peer in peers.items()}
    peers.clear()
    say(f"{name}: Fisher pass and choice")
    fisher, choice = measure_choosing(shape, plan.density, batches[0][1], plan.turns)
    return {
        "model": name,
        **sizes,
        "trained": trained,
        "memory": memory,
        "steps": steps,
        "files": files,
        "file sizes": file_sizes,
        "fisher": fisher,
        "choice": choice,
        "choice memory": {who: in_fresh_process(peak_of_choice, shape, plan.density, who) for who in ("ours", "peer")},
    }


def on_device(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the device that is measured."""
    return {key: tensor.to(DEVICE) for key, tensor in batch.items()}


def measure_steps(
    peers: Mapping[str, Peer], batch: Mapping[str, Tensor], turns: int, is_first: bool, all_methods: bool
) -> Turns:
    """Steps; on the first batch inference and merging as well."""
    work = {
        method: peer.training(batch) | (peer.inference(batch) | peer.merging(batch) if is_first else {})
        for method, peer in peers.items()
        if is_first or all_methods or method in SOME
    }
    return take_turns(work, turns)


def measure_files(peers: Mapping[str, Peer], turns: int, folder: Path) -> tuple[Turns, dict[str, int]]:
    """Files of the adapters, and of the whole model."""
    folders = {method: folder / method for method in ("full", *ADAPTERS)}
    seconds = take_turns({method: peers[method].filing(where) for method, where in folders.items()}, turns)
    return seconds, {method: weights_file(where).stat().st_size for method, where in folders.items()}


def measure_memory(shape: Shape, density: float, batch: tuple[int, int], chosen: Path) -> dict[str, int]:
    """Peaks above the base model of training, and of choosing, which makes the adapter `chosen`."""
    base = in_fresh_process(peak_of_base, shape)
    peaks = {
        "choosing": in_fresh_process(peak_of_choosing, shape, density, batch, chosen),
        "choosing, authors": in_fresh_process(peak_of_authors_choosing, shape, density, batch),
    }
    for method in METHODS:
        peaks[method] = in_fresh_process(peak_of_training, shape, method, density, batch, chosen)
    return {what: peak - base for what, peak in peaks.items()}


def peak_of_base(shape: Shape) -> int:
    """Peak memory with the model alone."""
    model = build(shape).to(DEVICE)
    assert model is not None
    return peak_memory()


def peak_of_training(shape: Shape, method: str, density: float, batch: tuple[int, int], chosen: Path | None) -> int:
    """Peak memory of some training steps."""
    peer = Peer(shape, method, density, chosen)
    phases = peer.training(on_device(batch_of(shape, *batch)))
    for _ in range(3):
        for call in phases.values():
            call()
    return peak_memory()


def peak_of_choosing(
    shape: Shape, density: float, batch: tuple[int, int], chosen: Path, granularity: str = "entry"
) -> int:
    """Peak memory of choosing a child network, which is saved."""
    model = task_driven(shape, density, granularity)
    select_child_network(model, [batch_of(shape, *batch)], progress_bar=False)
    peak = peak_memory()
    model.save_pretrained(chosen)
    return peak


def peak_of_authors_choosing(shape: Shape, density: float, batch: tuple[int, int]) -> int:
    """The same for the authors' loop and percentile."""
    model = build(shape).to(DEVICE)
    scores = authors.estimate_fisher(
        model, dict(targeted(model)), [on_device(one) for one in in_parts(batch_of(shape, *batch), 1)]
    )
    masks = authors.select_largest(scores, density)
    assert masks
    return peak_memory()


def task_driven(shape: Shape, density: float, granularity: str = "entry") -> Any:
    """The model with an adapter whose child network has not been chosen."""
    model = build(shape).to(DEVICE)
    names = sorted({name.rpartition(".")[0] for name, _ in targeted(model)})
    config = ChildTuningConfig(density=density, target_modules=names, granularity=granularity)
    return get_peft_model(model, config)


def measure_choosing(shape: Shape, density: float, length: int, turns: int) -> tuple[Turns, Turns]:
    """A Fisher pass over some examples, and the choice from its scores; `peer` is the authors' way."""
    ours, theirs = task_driven(shape, density), build(shape).to(DEVICE)
    batch = batch_of(shape, EXAMPLES, length)
    examples = [on_device(example) for example in in_parts(batch, 1)]
    batches = in_parts(batch, TOGETHER)
    found: dict[str, Tensor] = {}
    work = {
        "ours": {"pass": lambda: found.update(estimate_fisher(ours, batches, progress_bar=False))},
        "peer": {"pass": partial(authors.estimate_fisher, theirs, dict(targeted(theirs)), examples)},
    }
    fisher = take_turns(work, turns)
    size = round(density * sum(score.numel() for score in found.values()))
    work = {
        "ours": {"choice": partial(select_largest, found, size)},
        "peer": {"choice": partial(authors.select_largest, found, density)},
    }
    return fisher, take_turns(work, turns)


def peak_of_choice(shape: Shape, density: float, who: str) -> int:
    """Memory that a choice takes besides the scores and what it returns."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in targeted(build(shape))}
    scores = {name: torch.rand(size, device=DEVICE) for name, size in sizes.items()}
    before = peak_memory()
    if who == "ours":
        chosen = select_largest(scores, round(density * sum(sizes.values())))
    else:
        chosen = authors.select_largest(scores, density)
    return peak_memory() - before - sum(tensor.nbytes for tensor in chosen.values())


class Repeated(Mapping[str, Tensor]):
    """As many scores as one likes: the same tensor under many names, so that they need no memory."""

    def __init__(self, count: int) -> None:
        self.score = torch.rand(10_000_000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        self.names = [f"layers.{index}.weight" for index in range(count // self.score.numel())]

    def __getitem__(self, name: str) -> Tensor:
        return self.score

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def measure_many_scores(count: int, density: float) -> float:
    """Seconds of one choice from `count` scores."""
    return timed(partial(select_largest, Repeated(count), round(density * count)))
