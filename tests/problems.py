"""Small models of every kind that a child network can live in, each with a batch that has labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Regression(nn.Module):
    """Inputs through `body`; the loss is the mean squared distance to the labels."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, labels):
        logits = self.body(x)
        return Output(F.mse_loss(logits.float(), labels), logits)


class Twice(nn.Module):
    """One linear layer that runs twice in one graph."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its `out_proj` without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """A fused three-dimensional weight, as mixture-of-experts layers have it."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 5, 4) * 0.3)

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.gate_up_proj)


class Problem(NamedTuple):
    """A way to build a model, its targets, and a batch of four examples.

    `build` makes the same model after the same seed.
    """

    build: type | object
    targets: dict
    batch: object


def _regression(body, width_in, width_out, **targets):
    shape = (4, *width_in) if isinstance(width_in, tuple) else (4, width_in)
    out = (4, *width_out) if isinstance(width_out, tuple) else (4, width_out)
    return Problem(lambda: Regression(body()), targets, lambda: {"x": torch.randn(shape), "labels": torch.randn(out)})


def _tokens(vocabulary=50, length=6):
    return torch.randint(2, vocabulary, (4, length))


def _lm_batch():
    ids = _tokens()
    return {"input_ids": ids, "labels": ids.clone()}


def tiny_bert(**changes):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **changes
    )
    return BertForSequenceClassification(config)


def bert_batch():
    return {"input_ids": _tokens(), "labels": torch.randint(0, 2, (4,))}


def tiny_llama(tie_word_embeddings=False):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    )


def _tiny_mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _tiny_t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


PROBLEMS = {
    "linear": _regression(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 6, 3,
                          target_modules=["body.0", "body.2"]),
    "twice": _regression(Twice, 6, 6, target_modules=["inner"]),
    "layer_norm": _regression(lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), 6, 3,
                              target_modules=["body.0"]),
    "conv2d": _regression(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), (2, 4, 4), 12,
                          target_modules=["body.0"]),
    "attention": _regression(Attention, (5, 8), (5, 8), target_modules=["attention"]),
    "attention_output": _regression(Attention, (5, 8), (5, 8), target_modules=["out_proj"]),
    "experts": _regression(Experts, 5, 4, target_parameters=["gate_up_proj"]),
    "mixtral": Problem(_tiny_mixtral, {"target_parameters": ["gate_up_proj", "down_proj"]}, _lm_batch),
    "gpt2": Problem(tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "ln_1"]}, _lm_batch),
    "gpt2_tied": Problem(tiny_gpt2, {"target_modules": ["wte"]}, _lm_batch),
    "llama": Problem(tiny_llama, {"target_modules": "all-linear"}, _lm_batch),
    "llama_embedding": Problem(tiny_llama, {"target_modules": ["embed_tokens"]}, _lm_batch),
    "llama_tied_head": Problem(lambda: tiny_llama(True), {"target_modules": ["lm_head"]}, _lm_batch),
    "bert": Problem(tiny_bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, bert_batch),
    "bert_parameters": Problem(
        tiny_bert, {"target_parameters": ["LayerNorm.weight", "query.bias", "position_embeddings.weight"]}, bert_batch
    ),
    "bert_container": Problem(tiny_bert, {"target_modules": ["bert.encoder.layer.1"]}, bert_batch),
    "t5": Problem(_tiny_t5, {"target_modules": ["q", "v", "wo", "shared"]}, _lm_batch),
}  # fmt: skip


def build(name, seed=0, dtype=torch.float32):
    """The base model of a problem, in eval mode, always with the same weights."""
    torch.manual_seed(seed)
    return PROBLEMS[name].build().to(dtype).eval()


def batch_of(name, seed=1, dtype=torch.float32):
    torch.manual_seed(seed)
    batch = PROBLEMS[name].batch()
    return {key: value.to(dtype) if key == "x" else value for key, value in batch.items()}
