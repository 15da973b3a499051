"""Seconds of calls that take turns, the largest memory of a fresh process, and the machine that both belong to."""

import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from statistics import median
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import processor


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
START = time.perf_counter()
Calls = Mapping[str, Callable[[], object]]
Turns = dict[str, dict[str, list[float]]]


def take_turns(work: Mapping[str, Calls], turns: int, warm_up: int = 1) -> Turns:
    """Time all calls of everyone in every turn, so that other load on the machine meets all of them.

    Args:
        work: By method the calls by phase, in their order; those whose name starts with '_' are made and not timed.
        turns: Measured turns.
        warm_up: Turns before them.

    Returns:
        Seconds of every turn by method and phase.
    """
    seconds: Turns = {who: {phase: [] for phase in calls if phase[0] != "_"} for who, calls in work.items()}
    order = list(work)
    for turn in range(-warm_up, turns):
        for who in order:
            for phase, call in work[who].items():
                elapsed = timed(call)
                if turn >= 0 and phase in seconds[who]:
                    seconds[who][phase].append(float(f"{elapsed:.4g}"))
        order.append(order.pop(0))  # nobody always comes after the same one, or first
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, until the device has done it."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def say(text: str) -> None:
    """Tell people on standard error what is about to be measured, and when."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def wait() -> None:
    """Wait for what the device still has to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def total(seconds: Mapping[str, Sequence[float]], phases: Iterable[str]) -> list[float]:
    """Seconds of several phases together, turn by turn."""
    return [sum(turn) for turn in zip(*(seconds[phase] for phase in phases), strict=True)]


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios within a turn."""
    return median(one / two for one, two in zip(ours, other, strict=True))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a process that has done nothing else.

    On the CPU it is forked from a process that has only imported things, which takes less time than importing them
    again, and starts with that process' size. CUDA does not survive forking.
    """
    context = multiprocessing.get_context("spawn" if DEVICE.type == "cuda" else "forkserver")
    if DEVICE.type == "cpu":
        context.set_forkserver_preload(["torch", "transformers", "peft", "peft_child"])
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as executor:
        return executor.submit(function, *args).result()


def peak_memory() -> int:
    """Largest memory of this process so far in bytes: allocated on the CUDA device, or resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_allocated(step: Callable[[], object]) -> int:
    """Largest number of bytes alive at once while `step` runs on the CPU, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    alive = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


PACKAGES = ("torch", "peft", "transformers", "numpy", "safetensors", "peft-child")


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What the figures depend on, with the versions of some packages."""
    on_cuda = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "cores": psutil.cpu_count(logical=False),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
