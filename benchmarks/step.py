"""Time and memory of a training step: full fine-tuning, PEFT's SHiRA and LoRA, and Child-Tuning, in one run.

    python benchmarks/step.py

The model is a BERT encoder built from a configuration, with a vocabulary too small to matter, on a CUDA device or else
the CPU. The methods take turns, so that other load on the machine meets all of them: it moves the absolute times, but
hardly the ratios, which are medians of the ratios within a turn. One CPU thread is the default, since several would
wait for each other wherever a core is not theirs alone.

Peak memory is measured in one fresh process for each method: its largest resident size, or what PyTorch has allocated
on the CUDA device, less the same of a process that only builds the base model.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from functools import partial
from statistics import median

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from peft_child import ChildTuningConfig


METHODS = {
    "full": "full fine-tuning",
    "shira": "PEFT SHiRA",
    "lora": "PEFT LoRA, r=8",
    "child": "Child-Tuning",
    "task_free": "Child-Tuning_F",
}
WARM_UP = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """The encoder under one method, or "base" for the encoder alone, with an optimizer and a batch."""

    def __init__(self, args, method):
        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
        bert = BertConfig(
            vocab_size=1000,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            intermediate_size=4 * args.hidden,
            max_position_embeddings=max(512, args.length),
        )
        self.model = BertModel(bert, add_pooling_layer=False).to(DEVICE)
        if method == "base":
            return
        if method != "full":
            self.model = get_peft_model(self.model, adapter_config(method, args.density, self.model))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.entries = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # the Trainer's default
        self.tokens = torch.randint(1000, (args.batch, args.length), device=DEVICE)
        self.wanted = torch.randn(args.batch, args.length, args.hidden, device=DEVICE)

    def train(self):
        """One step: forward, backward and optimizer."""
        self.model.train()
        loss = nn.functional.mse_loss(self.model(self.tokens).last_hidden_state, self.wanted)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self):
        """One forward pass with the adapter active, not merged."""
        self.model.eval()
        with torch.inference_mode():
            self.model(self.tokens)


def adapter_config(method, density, base):
    """The configuration of an adapter for all linear layers of `base`."""
    if method == "lora":
        return LoraConfig(r=8, target_modules="all-linear")
    if method in ("child", "task_free"):
        variant = "random" if method == "child" else "task_free"
        return ChildTuningConfig(variant=variant, density=density, target_modules="all-linear")
    linears = [module for module in base.modules() if isinstance(module, nn.Linear)]
    targeted = sum(parameter.numel() for linear in linears for parameter in linear.parameters())
    entries_per_rank = sum(linear.in_features + linear.out_features for linear in linears)
    return ShiraConfig(r=max(1, round(density * targeted / entries_per_rank)), target_modules="all-linear")


def measure_seconds(runs, kind, repeats):
    """Seconds of every turn by method; `kind` is "train" or "infer"."""
    seconds = {method: [] for method in runs}
    for turn in range(-WARM_UP, repeats):
        for method, run in runs.items():
            start = time.perf_counter()
            getattr(run, kind)()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[method].append(time.perf_counter() - start)
    return seconds


def measure_peak(args, method):
    """Largest memory in bytes after some training steps; for a process that has done nothing else."""
    run = Run(args, method)
    for _ in range(0 if method == "base" else WARM_UP):
        run.train()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure, and print absolute figures and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder")
    parser.add_argument("--hidden", type=int, default=768, help="its width, a multiple of 64")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--density", type=float, default=0.1, help="share of the child network, for SHiRA as well")
    parser.add_argument("--repeats", type=int, default=9, help="measured turns")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()

    # Memory comes first: on Linux a new process starts with the largest size that its parent has had so far.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        base, *peaks = pool.map(partial(measure_peak, args), ["base", *METHODS], chunksize=1)
    memory = {method: (peak - base) / 2**20 for method, peak in zip(METHODS, peaks, strict=True)}
    runs = {method: Run(args, method) for method in METHODS}
    train, infer = (measure_seconds(runs, kind, args.repeats) for kind in ("train", "infer"))

    where, source = ("CUDA", "allocated") if DEVICE.type == "cuda" else (f"{args.threads} CPU thread(s)", "resident")
    print(f"{args.layers} layers of {args.hidden}, {args.batch} x {args.length} tokens, {where}")
    print(f"medians of {args.repeats} turns; peak memory ({source}) above the base model\n")
    print(f"{'':26}{'entries':>12}{'train ms':>12}{'infer ms':>12}{'peak MiB':>12}")
    for method, name in METHODS.items():
        times = "".join(f"{1e3 * median(seconds[method]):12.1f}" for seconds in (train, infer))
        print(f"{name:26}{runs[method].entries:12,}{times}{memory[method]:12.0f}")
    print("\nChild-Tuning relative to")
    for method in (method for method in METHODS if method != "child"):
        pairs = (zip(seconds["child"], seconds[method], strict=True) for seconds in (train, infer))
        ratios = "".join(f"{median(ours / other for ours, other in pair):12.2f}" for pair in pairs)
        print(f"  {METHODS[method]:36}{ratios}{memory['child'] / memory[method]:12.2f}")


if __name__ == "__main__":
    main()
