"""Memory that fine-tuning large Llamas with input channels takes by part, and the same counted on a small one.

    python -m benchmarks.plan            # the table of docs/scale.md
    python -m benchmarks.plan --count    # planned and counted bytes of a model that fits here; needs bitsandbytes

The plan follows from the shapes of the weights alone. Batches hold one sequence, activations are checkpointed layer by
layer, and AdamW trains the deltas in float32.
"""

import argparse
from typing import NamedTuple

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.measure import peak_allocated
from benchmarks.shapes import build, llama
from peft_child import ChildTuningConfig


class Size(NamedTuple):
    """A Llama by its widths; `tied` if the head shares the weights of the embeddings."""

    hidden: int
    layers: int
    inner: int
    key_value: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> int:
        """Weights of the linear layers without the head, which 'all-linear' targets."""
        return self.layers * self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.inner)

    @property
    def others(self) -> int:
        """Weights of the embeddings and the head, which stay in bfloat16."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


LLAMAS = {
    "1B": Size(2048, 16, 8192, 512, 128_256, tied=True),
    "8B": Size(4096, 32, 14_336, 1024, 128_256),
    "70B": Size(8192, 80, 28_672, 1024, 128_256),
}
BYTES = {"bfloat16": 2.0, "NF4": 0.5 + (1 + 4 / 256) / 64}  # a scale of a byte for 64 weights, and of 4 for 256 scales
CASES = [  # model, base, density, ranks; one for each row
    *(("1B", "bfloat16", 0.1, 1), ("8B", "bfloat16", 0.01, 1), ("8B", "NF4", 0.1, 1), ("8B", "bfloat16", 0.1, 1)),
    *(("70B", "NF4", 0.01, 1), ("70B", "bfloat16", 0.1, 8)),
]


def parts(size: Size, base: str, density: float, ranks: int, tokens: int) -> dict[str, float]:
    """Bytes on each rank, by part; docs/scale.md explains each."""
    chosen = density * size.linear
    activations = 2 * tokens * size.hidden * size.layers  # the input of each layer
    activations += 34 * tokens * size.hidden + 2 * tokens * 3 * (size.inner - 4 * size.hidden)  # one layer, run again
    logits = tokens * size.vocabulary * (2 + 4 + 4)  # in bfloat16, in float32, and their gradient
    largest = size.hidden * size.inner
    return {
        "weights": (BYTES[base] * size.linear + 2 * size.others) / ranks,
        "deltas": 4 * chosen / ranks,
        "gradients": 4 * chosen / ranks,
        "AdamW": 8 * chosen / ranks,
        "activations": activations + logits,
        "for a moment": 2 * largest * (1 if ranks == 1 else 3),  # one unpacked weight; with FSDP2 a layer's weights
        "choosing": 4 * size.linear / min(size.hidden, size.inner),
    }


def table(tokens: int = 2048) -> str:
    """The plan in GB, as Markdown."""
    names = list(parts(LLAMAS["1B"], "NF4", 0.1, 1, tokens))[:-1]
    lines = [
        "| model | base | density | " + " | ".join(names) + " | **sum** | scores while choosing |",
        "|---|---|--:|" + "--:|" * (len(names) + 2),
    ]
    for name, base, density, ranks in CASES:
        found = parts(LLAMAS[name], base, density, ranks, tokens)
        scores = found.pop("choosing")
        cells = [f"{value / 1e9:.1f}" for value in found.values()]
        where = f"{base}, {ranks} ranks" if ranks > 1 else base
        total = f"**{sum(found.values()) / 1e9:.1f}**"
        lines.append(f"| {name} | {where} | {density} | {' | '.join(cells)} | {total} | {scores / 1e6:.0f} MB |")
    return "\n".join(lines)


def counted(base: str, density: float, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """Planned and counted bytes of a Llama of 50 million weights: what a step needs besides is its peak."""
    shape = llama(16, 512)
    model = build(shape).to(torch.bfloat16)
    config = model.config
    size = Size(
        *(config.hidden_size, config.num_hidden_layers, config.intermediate_size),
        config.num_key_value_heads * (config.hidden_size // config.num_attention_heads),
        config.vocab_size,
        config.tie_word_embeddings,
    )
    if base == "NF4":
        _quantise(model)
    weights = sum(_bytes(parameter) for parameter in model.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"granularity": "input_channel", "variant": "random", "target_modules": "all-linear"}
    adapted = get_peft_model(model, ChildTuningConfig(density=density, **settings)).train()
    deltas = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(deltas, foreach=False)
    ids = torch.randint(config.vocab_size, (1, tokens))

    def pass_through() -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()

    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        pass_through()
        optimizer.step()
    found = {
        "weights": weights,
        "deltas": sum(map(_bytes, deltas)),
        "gradients": sum(_bytes(delta.grad) for delta in deltas),
        "AdamW": sum(_bytes(value) for state in optimizer.state.values() for value in state.values() if value.dim()),
        "activations and a moment": peak_allocated(pass_through),
    }
    plan = parts(size, base, density, 1, tokens)
    plan["activations and a moment"] = plan.pop("activations") + plan.pop("for a moment")
    return {name: plan[name] for name in found}, found


def _quantise(model: nn.Module) -> None:
    """Put 4-bit layers in the place of the linear ones, with quantised scales."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                False,
                torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            packed.load_state_dict(module.state_dict())
            model.set_submodule(path, packed.to("cpu"))


def _bytes(tensor: torch.Tensor) -> int:
    state = getattr(tensor, "quant_state", None)
    extra = 0 if state is None else state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return tensor.nbytes + extra


def main() -> None:
    """Print the plan, or the plan beside what was counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count the bytes of a small model")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the sequence")
    args = parser.parse_args()
    if not args.count:
        print(table(args.tokens))
        return
    torch.set_num_threads(1)
    for base in BYTES:
        planned, found = counted(base, 0.1, args.tokens)
        for name, value in found.items():
            print(f"{base:10}{name:28}{planned[name] / 1e6:10.2f} MB planned{value / 1e6:10.2f} MB counted")


if __name__ == "__main__":
    main()
