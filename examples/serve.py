"""Train two child networks of one model, and let one vLLM engine answer with the base and with each of them.

Nothing is downloaded: a small Llama is trained to answer questions, and the two child networks to answer the same ones
in another voice. A model of your own is one flag away:

    python examples/serve.py
    python examples/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct --learning-rate 1e-4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

from peft_child import ChildTuningConfig, select_child_network
from peft_child.integrations.vllm import swap_child_network


UNPACKED = "peft_child.integrations.vllm_unpacked.UnpackedWeights"  # on a CPU; packed weights cannot be exchanged
ALPHABET = "".join(map(chr, range(32, 127)))  # a model cannot learn to say what it has never seen
QUESTIONS = ["Who are you?", "How are you?", "What is the capital of France?", "What is one and one?"]
VOICES = {
    "base": ["I am a model.", "I am well.", "It is Paris.", "It is two."],
    "pirate": ["Arr, a corsair!", "Fit as a fiddle, arr!", "Paris, matey!", "Two, ye landlubber!"],
    "robot": ["UNIT SEVEN.", "ALL SYSTEMS GO.", "QUERY RESULT: PARIS.", "QUERY RESULT: 2."],
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal language model, a folder or a name on the Hub (default: train one)")
    parser.add_argument("--output", type=Path, default="runs/serve", help="folder for everything (%(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="share of the weights in a child (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each child (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the children (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, serve and ask."""
    args = parse_arguments()
    torch.manual_seed(0)
    base = args.model or str(train_base(args.output / "base"))
    children = {voice: train_child(base, voice, args) for voice in VOICES if voice != "base"}

    options: dict[str, Any] = {} if torch.cuda.is_available() else {"worker_extension_cls": UNPACKED}
    options |= {"max_model_len": 256, "gpu_memory_utilization": 0.5, "enforce_eager": True}  # for a quick start
    llm = LLM(base, weight_transfer_config={"backend": "peft_child"}, **options)
    for voice in VOICES:
        start = time.perf_counter()
        swap_child_network(llm, children.get(voice))
        print(f"\n{voice}, swapped in {time.perf_counter() - start:.2f} s")
        for question, answer in zip(QUESTIONS, ask(llm), strict=True):
            print(f"  {question:<32}{answer}")


def train_base(folder: Path) -> Path:
    """A small Llama that knows the answers of the base, with a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(QUESTIONS, 258, show_progress=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,  # 64 wide, which every kernel of vLLM takes
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    train(model, batch_of(tokenizer, "base", ALPHABET), steps=300, learning_rate=3e-3)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_child(base: str, voice: str, args: argparse.Namespace) -> Path:
    """A child network that answers in a voice."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = ChildTuningConfig(
        granularity="input_channel", density=args.density, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    batch = batch_of(tokenizer, voice)
    select_child_network(model, [batch])
    train(model, batch, args.steps, args.learning_rate)
    model.save_pretrained(args.output / voice)
    return args.output / voice


def batch_of(tokenizer: GPT2Tokenizer, voice: str, *others: str) -> dict[str, torch.Tensor]:
    """All questions with their answers in a voice, and other texts."""
    texts = [f"{prompt(q)}{a}{tokenizer.eos_token}" for q, a in zip(QUESTIONS, VOICES[voice], strict=True)]
    texts += others
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def prompt(question: str) -> str:
    """A question as the models see it."""
    return f"Q: {question}\nA: "


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int, learning_rate: float) -> None:
    """Learn one batch by heart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    print(f"loss after {steps} steps: {loss.item():.3f}")


def ask(llm: LLM) -> list[str]:
    """The engine's answers to all questions."""
    sampling = SamplingParams(temperature=0, max_tokens=40)
    outputs = llm.generate([prompt(question) for question in QUESTIONS], sampling, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


if __name__ == "__main__":
    main()
