"""Full fine-tuning, Child-Tuning and LoRA side by side, on text that every Python installation holds.

Nothing is downloaded: a small Llama model is trained on the source code of the standard library (the old domain), and
then adapted to the language reference behind Python's `help()` (the new domain). What each method learns there,
forgets here and stores on disk goes into a table and two pictures. A run of your own is one flag away:

    python examples/quickstart.py
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M --new-text notes.txt
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from peft_child import ChildTuningConfig, ChildTuningLayer, select_child_network


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 128  # tokens of one example
VOCABULARY = 2048  # tokens that the small model knows
HELD_OUT = 0.1  # share of each text that is only used for evaluation
METHODS = ("Full fine-tuning", "Child-Tuning (CT_D)", "LoRA")
# By method. Of four rates tried for each with the defaults, these learn the new domain best, up to 1 % of perplexity.
# Smaller ones learn less and forget less. In this small setting full fine-tuning at 3e-4 learns as much as the other
# two do here, and forgets less than they; what they save is the size of the file.
LEARNING_RATES = [3e-3, 1e-2, 1e-2]
PRETRAINED_LEARNING_RATES = [5e-5, 3e-4, 3e-4]  # with --model; a cautious guess, to be tuned for yours
SIZES = {"documents": None, "hidden_size": 128, "held_out_examples": 128}
TINY = {"documents": 8, "hidden_size": 32, "held_out_examples": 8, "pretrain_steps": 10, "steps": 5, "batch_size": 2}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--model` and `--tiny` change defaults, so that the other flags still count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal language model, a folder or a name on the Hub (default: train one)")
    parser.add_argument("--old-text", nargs="+", type=Path, metavar="FILE", help="what the model should not forget")
    parser.add_argument("--new-text", nargs="+", type=Path, metavar="FILE", help="what the model should learn")
    parser.add_argument("--output", type=Path, default="runs/quickstart", help="folder for everything (%(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="share of entries in the child (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each method (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help=f"examples of {CONTEXT} tokens (%(default)s)")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="without --model (%(default)s)")
    parser.add_argument("--fisher-examples", type=int, default=256, help="for the selection (%(default)s)")
    parser.add_argument(
        "--learning-rates",
        nargs=3,
        type=float,
        metavar=("FULL", "CHILD", "LORA"),
        help="default: found for the default run, smaller with --model",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of examples (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds that shows only that everything works")
    args = parser.parse_args()
    parser.set_defaults(learning_rates=PRETRAINED_LEARNING_RATES if args.model else LEARNING_RATES, **SIZES)
    if args.tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args()


# Texts


def read(files: list[Path]) -> list[str]:
    """The texts of files."""
    return [file.read_text(encoding="utf-8") for file in files]


def source_code() -> list[str]:
    """The modules of the standard library, in a fixed random order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return read(random.Random(0).sample(files, len(files)))


def reference_prose() -> list[str]:
    """The topics of the language reference, in a fixed random order, each paragraph once."""
    seen: set[str] = set()  # topics contain one another, and what is held out must not be in the training text
    documents = []
    for name in random.Random(0).sample(sorted(topics), len(topics)):
        paragraphs = [paragraph for paragraph in dict.fromkeys(topics[name].split("\n\n")) if paragraph not in seen]
        seen.update(paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents


def encode(tokenizer: Any, documents: list[str]) -> tuple[Tensor, Tensor]:
    """Examples to train on and, from the end of the text, examples held out; both of shape (examples, CONTEXT)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for document in encoded for token in [*document, *end]]
    count = len(tokens) // CONTEXT
    if count < 2:
        raise SystemExit(f"A text needs at least {2 * CONTEXT} tokens, one has {len(tokens)}.")
    examples = torch.tensor(tokens[: count * CONTEXT], device=DEVICE).view(count, CONTEXT)
    border = count - math.ceil(HELD_OUT * count)
    return examples[:border], examples[border:]


def batches(examples: Tensor, args: argparse.Namespace, shuffle: bool = True) -> DataLoader[dict[str, Tensor]]:
    """Batches as language models take them, in the same order for every method."""
    generator = torch.Generator().manual_seed(args.seed)
    dataset: Any = [{"input_ids": example, "labels": example} for example in examples]
    return DataLoader(dataset, args.batch_size, shuffle=shuffle, generator=generator)


# Models


def pretrain(tokenizer: GPT2Tokenizer, examples: Tensor, args: argparse.Namespace) -> str:
    """Train a small Llama model from scratch; returns the folder of the model and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    nn.init.normal_(model.get_input_embeddings().weight)  # small ones would leave most of the child to the first layer
    train(model, examples, args.pretrain_steps, 4e-3, args, "Pretraining")
    folder = args.output / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(
    model: nn.Module, examples: Tensor, steps: int, learning_rate: float, args: argparse.Namespace, title: str
) -> None:
    """Train in the ordinary way; nothing here knows of adapters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    endless = chain.from_iterable(repeat(batches(examples, args)))
    model.train()
    with tqdm(islice(endless, steps), desc=title, total=steps, unit="step", disable=None) as bar:
        for batch in bar:
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()


def load_base(source: str) -> Any:
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(DEVICE)


@torch.no_grad()
def perplexity(model: nn.Module, examples: Tensor, args: argparse.Namespace) -> float:
    """Perplexity over all predicted tokens of the examples."""
    bar = tqdm(batches(examples, args, shuffle=False), desc="Perplexity", unit="batch", leave=False, disable=None)
    total = sum(model(**batch).loss.item() * len(batch["input_ids"]) for batch in bar)
    return math.exp(total / len(examples))


# The comparison


class Row(NamedTuple):
    """Perplexities on held-out text of both domains, trained entries, and bytes of the weights one would share."""

    method: str
    new: float
    old: float
    trained: int
    num_bytes: int


@dataclass
class Comparison:
    """The settings and examples that all methods have in common."""

    args: argparse.Namespace
    train: Tensor
    new: Tensor
    old: Tensor

    def adapt(self, method: int, model: Any, folder: Path) -> Row:
        """Train a model with one of the METHODS, save what was trained, and measure."""
        train(model, self.train, self.args.steps, self.args.learning_rates[method], self.args, METHODS[method])
        model.save_pretrained(folder)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return self.measure(METHODS[method], model, trained, num_bytes)

    def measure(self, name: str, model: Any, trained: int = 0, num_bytes: int = 0) -> Row:
        """One row of the table."""
        new, old = perplexity(model, self.new, self.args), perplexity(model, self.old, self.args)
        return Row(name, new, old, trained, num_bytes)


@torch.no_grad()
def check_round_trip(child: PeftModel, base: Any, folder: Path, inputs: Tensor) -> None:
    """Saved, loaded into a fresh base, and merged, the adapter must give the same logits, bit for bit."""
    expected = child(inputs).logits
    loaded = PeftModel.from_pretrained(base, folder)
    if not torch.equal(loaded(inputs).logits, expected):
        raise SystemExit("The loaded adapter does not give the logits of the trained one.")
    if not torch.equal(loaded.merge_and_unload()(inputs).logits, expected):
        raise SystemExit("The merged model does not give the logits of the adapter.")
    print("The saved adapter gives the same logits, bit for bit, loaded into a fresh base and merged into it.")


def targeted_layers(child: PeftModel) -> dict[str, Any]:
    """The layers that the child network was chosen from, by path."""
    return {path: layer for path, layer in child.named_modules() if isinstance(layer, ChildTuningLayer)}


# Results


def print_table(rows: list[Row], numel: int) -> None:
    """The comparison, for a model of `numel` entries."""
    print(f"\n{'':20}{'perplexity on held-out':>22}{'trained':>14}{'share of':>10}{'to share':>10}")
    print(f"{'method':20}{'new domain':>11}{'old domain':>11}{'entries':>14}{'the model':>10}{'MB':>10}")
    for row in rows:
        size = f"{row.num_bytes / 1e6:.2f}" if row.num_bytes else "-"
        print(f"{row.method:20}{row.new:11.1f}{row.old:11.1f}{row.trained:14,}{row.trained / numel:10.1%}{size:>10}")


def draw_child(child: PeftModel, file: Path) -> None:
    """A heat map of the child network, by layer and module."""
    cells = {}
    for path, layer in targeted_layers(child).items():
        found = re.fullmatch(r".*?\.(\d+)\.(.+)", path)
        chosen = sum(delta.numel() for delta in layer.child_delta["default"].values())
        numel = sum(parameter.numel() for parameter in layer.base_layer.parameters())
        cells[(found[1], found[2]) if found else ("-", path)] = 100 * chosen / numel
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    shares = [[cells.get((row, column), math.nan) for column in columns] for row in rows]

    figure, axes = plt.subplots(figsize=(2 + 0.9 * len(columns), 1.5 + 0.45 * len(rows)), layout="constrained")
    image = axes.imshow(shares, cmap="cividis", vmin=0, aspect="auto")
    for (row, column), share in cells.items():
        color = "black" if image.norm(share) > 0.5 else "white"
        axes.text(columns.index(column), rows.index(row), f"{share:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns)), [column.replace(".", "\n") for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(title="Child network: entries chosen in each module (%)", ylabel="layer")
    figure.colorbar(image, label="share of the module (%)")
    figure.savefig(file, dpi=150)


def draw_perplexities(rows: list[Row], file: Path) -> None:
    """Bars of the perplexities on both domains, with a line at the base model's."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    titles = {"new": "New domain: what was learned", "old": "Old domain: what was forgotten"}
    for axes, color, (domain, title) in zip(panels, ("#0072B2", "#E69F00"), titles.items(), strict=True):
        values = [getattr(row, domain) for row in rows]
        axes.bar_label(axes.barh([row.method for row in rows], values, color=color), fmt="%.1f", padding=3)
        axes.axvline(values[0], color="black", linewidth=1, linestyle="--")
        axes.margins(x=0.2)
        axes.set(title=title, xlabel="perplexity (lower is better; dashed: base)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Prepare the base model, adapt it in three ways, and compare."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    matplotlib.use("Agg")
    if not sys.stderr.isatty():  # tqdm's bars are for terminals alone, too
        disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT uses transformers' old name
    config = ChildTuningConfig(density=args.density, target_modules="all-linear", task_type="CAUSAL_LM")
    args.output.mkdir(parents=True, exist_ok=True)
    old_text = (read(args.old_text) if args.old_text else source_code())[: args.documents]
    new_text = (read(args.new_text) if args.new_text else reference_prose())[: args.documents]
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:  # a byte-level BPE of its own, of the kind that GPT-2 has
        tokenizer = GPT2Tokenizer().train_new_from_iterator(old_text, VOCABULARY, show_progress=False)
    old_train, old = encode(tokenizer, old_text)
    new_train, new = encode(tokenizer, new_text)
    source = args.model or pretrain(tokenizer, old_train, args)
    comparison = Comparison(args, new_train, new[: args.held_out_examples], old[: args.held_out_examples])

    model = load_base(source)
    numel = model.num_parameters()
    rows = [comparison.measure("Base", model), comparison.adapt(0, model, args.output / "full")]

    child = get_peft_model(load_base(source), config)
    print(select_child_network(child, batches(new_train, args), num_examples=args.fisher_examples))
    rows.append(comparison.adapt(1, child, args.output / "child"))
    check_round_trip(child, load_base(source), args.output / "child", new[:8])

    # LoRA of rank r trains r * (rows + columns) entries of each matrix; the rank nearest to the size of the child.
    entries = sum(sum(layer.base_layer.weight.shape) for layer in targeted_layers(child).values())
    rank = max(1, round(rows[-1].trained / entries))
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    rows.append(comparison.adapt(2, get_peft_model(load_base(source), adapter), args.output / "lora"))

    print_table(rows, numel)
    draw_child(child, args.output / "child_network.png")
    draw_perplexities(rows, args.output / "perplexities.png")
    print(f"\nThe models and pictures are in {args.output}.")


if __name__ == "__main__":
    main()
