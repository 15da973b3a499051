"""Everything about a GPU in one command: its tests, steps and memory of a Llama of a billion weights, and the choice.

    python -m benchmarks.gpu --output docs

Takes under eight minutes on an H100 and writes `gpu.json` and `gpu.md`. Without a GPU it does the same with a tiny
model on the CPU, which only shows that the command works.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import DEVICE, machine, say, timed
from benchmarks.tables import table
from peft_child import ChildTuningConfig, select_child_network


TESTS = ("tests/contract/test_gpu.py", "tests/selection/test_fisher_pass.py")
ON_GPU = DEVICE.type == "cuda"
BATCH, LENGTH, EXAMPLES = (8, 512, 32) if ON_GPU else (2, 16, 4)
LATEST = 400.0  # seconds after which no compiled method begins


def build() -> LlamaForCausalLM:
    """A Llama of 1.1 billion weights in bfloat16, or a tiny one."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    if not ON_GPU:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32_000 if ON_GPU else 100, **sizes)
    torch.manual_seed(0)
    with DEVICE:
        return LlamaForCausalLM(config).to(torch.bfloat16)


def ours(granularity: str, density: float, variant: str = "random") -> ChildTuningConfig:
    """A child network of all linear layers."""
    return ChildTuningConfig(
        variant=variant, granularity=granularity, density=density, target_modules="all-linear", task_type="CAUSAL_LM"
    )


METHODS: dict[str, Callable[[], PeftConfig | None]] = {
    "LoRA, r = 16": partial(LoraConfig, r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "SHiRA, r = 16": partial(ShiraConfig, r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "entries, 0.01": partial(ours, "entry", 0.01),
    "entries, 0.1": partial(ours, "entry", 0.1),
    "input channels, 0.01": partial(ours, "input_channel", 0.01),
    "input channels, 0.1": partial(ours, "input_channel", 0.1),
    "full fine-tuning": lambda: None,
}


def batch_of(size: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens."""
    ids = torch.randint(vocabulary, (size, LENGTH), device=DEVICE)
    return {"input_ids": ids, "labels": ids}


def measure_steps(name: str, compiled: bool, turns: int) -> dict[str, Any]:
    """Seconds of training steps, and the peak memory of the device."""
    say(f"{name}{', compiled' if compiled else ''}")
    _reset()
    base, config = build(), METHODS[name]()
    model: nn.Module = base if config is None else get_peft_model(base, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    batch = batch_of(BATCH, base.config.vocab_size)

    def step() -> None:
        forward(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    first = timed(step)
    seconds = [timed(step) for _ in range(turns + 1)][1:]
    return {
        "method": name,
        "compiled": compiled,
        "trained": sum(parameter.numel() for parameter in trained),
        "first": first,
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() if ON_GPU else None,
    }


def measure_choice(granularity: str) -> dict[str, Any]:
    """Seconds and peak memory of choosing a child network, the Fisher pass included."""
    say(f"choosing, {granularity}")
    _reset()
    base = build()
    model = get_peft_model(base, ours(granularity, 0.1, "task_driven"))
    batches = [batch_of(BATCH, base.config.vocab_size) for _ in range(EXAMPLES // BATCH)]
    seconds = timed(lambda: select_child_network(model, batches, progress_bar=False))
    return {
        "granularity": granularity,
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() if ON_GPU else None,
    }


def _reset() -> None:
    torch._dynamo.reset()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_tests() -> str:
    """The last line of the tests that need a GPU; they are skipped without one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", "gpu or cuda or device"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    return done.stdout.strip().splitlines()[-1]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lora = {found["compiled"]: median(found["seconds"]) for found in results["steps"] if "LoRA" in found["method"]}
    rows = []
    for found in results["steps"]:
        step = median(found["seconds"])
        rows.append(
            [
                found["method"] + (", compiled" if found["compiled"] else ""),
                f"{found['trained']:,}",
                f"{1e3 * step:.1f}",
                f"{step / lora[found['compiled']]:.2f}",
                f"{BATCH * LENGTH / step:,.0f}",
                _gigabytes(found["peak"]),
            ]
        )
    choices = [[f["granularity"], f"{f['seconds']:.1f}", _gigabytes(f["peak"])] for f in results["choices"]]
    facts = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return "\n\n".join(
        [
            "# On a GPU",
            f"`{results['command']}` on {facts['device']}, {results['seconds']:.0f} s; medians of {results['turns']} "
            f"steps. {versions}. A Llama of {results['weights']:,} weights in bfloat16, batches of {BATCH} x {LENGTH} "
            "tokens, AdamW (fused), no activation checkpointing.",
            f"Tests: {results['tests']}",
            table(["", "trained", "step, ms", "to LoRA", "tokens per second", "peak, GB"], rows),
            f"Choosing from {EXAMPLES} examples at a density of 0.1:",
            table(["granularity", "seconds", "peak, GB"], choices),
        ]
    )


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print the page, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--turns", type=int, default=20 if ON_GPU else 2, help="measured steps")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    args = parser.parse_args(argv)
    start = time.time()
    tests = "not run" if args.no_tests else run_tests()
    steps = [measure_steps(name, compiled=False, turns=args.turns) for name in METHODS]
    choices = [measure_choice(granularity) for granularity in ("entry", "input_channel")]
    for name in METHODS if ON_GPU else ():
        if time.time() - start < LATEST:
            steps.append(measure_steps(name, compiled=True, turns=args.turns))
    results = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]) if argv is None else "",
        "machine": machine(),
        "turns": args.turns,
        "weights": sum(parameter.numel() for parameter in build().parameters()),
        "tests": tests,
        "steps": steps,
        "choices": choices,
        "seconds": time.time() - start,
    }
    text = page(results)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gpu.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
        (args.output / "gpu.md").write_text(text + "\n")
    return results


if __name__ == "__main__":
    main()
