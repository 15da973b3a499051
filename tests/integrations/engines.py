"""Small checkpoints, adapters and vLLM engines; nothing here needs PEFT."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks import serving  # which lets engines run in this process, so that tests can look into them


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; see make test-vllm")

engine = serving.engine
UNPACKED = serving.UNPACKED
SWAPPING = {**serving.SWAPPING, **UNPACKED}
PROMPTS = [[5, 17, 3, 80, 2, 9], [44, 4, 61]]
SIZES = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE_HEADS = {"num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 128}  # vLLM refuses narrow ones


def save_llama(folder, seed=0, tied=False):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, **WIDE_HEADS, intermediate_size=192, tie_word_embeddings=tied)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def save_experts(folder):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES,
        **WIDE_HEADS,
        intermediate_size=192,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def save_child(folder, base, seed=1, channels=False):
    """A random child network of every tensor of a checkpoint, a tenth of the entries or of the channels."""
    return serving.save_child(folder, base, 0.1, channels, seed, every_tensor=True)


def answers(llm, length=8):
    """Greedy tokens of the prompts, and the log-probability of each."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=length, logprobs=1, ignore_eos=True, detokenize=False)
    outputs = [
        output.outputs[0]
        for output in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    ]
    tokens = [list(output.token_ids) for output in outputs]
    return tokens, [
        [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        for output in outputs
    ]


def answers_of_transformers(folder, tokens):
    """The log-probabilities that transformers gives the same tokens, and the largest at each place."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), []
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        logarithms = logits.log_softmax(-1)
        found.append((logarithms.gather(1, torch.tensor(answer)[:, None])[:, 0], logarithms.max(-1).values))
    return found


def digests(llm):
    """Checksums of all weights of an engine with one worker."""
    (found,) = llm.collective_rpc("compute_weight_checksums")
    assert found
    return found
