"""Models that are built from a configuration, and batches for them; nothing is downloaded."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel


class Shape(NamedTuple):
    """What a model looks like; vocabularies are too small to matter.

    Attributes:
        kind: 'encoder' (BERT with a classification head) or 'decoder' (Llama).
        layers: Number of layers.
        width: Of the hidden states.
        heads: Attention heads.
        inner: Width inside the feed-forward layers.
    """

    kind: str
    layers: int
    width: int
    heads: int
    inner: int


VOCABULARY = 2048
SHAPES = {
    "encoder": Shape("encoder", 6, 768, 12, 3072),
    "minilm": Shape("encoder", 6, 384, 12, 1536),
    "llama": Shape("decoder", 14, 768, 12, 2048),
    "tiny encoder": Shape("encoder", 2, 64, 2, 256),
    "tiny llama": Shape("decoder", 2, 64, 2, 160),
}


def llama(layers: int, width: int) -> Shape:
    """A Llama whose linear layers are nearly all of it, `12 * layers * width ** 2` weights."""
    return Shape("decoder", layers, width, width // 32, 8 * width // 3)


def build(shape: Shape) -> PreTrainedModel:
    """The model, with the same random weights every time."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
    }
    if shape.kind == "encoder":
        return BertForSequenceClassification(BertConfig(**sizes, num_labels=2))
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape.heads, tie_word_embeddings=True))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the encoder or decoder by name, which all methods target; heads are left out."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer" in name
    }


def targeted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of these layers with their names."""
    for name, layer in linear_layers(model).items():
        for key, parameter in layer.named_parameters():
            yield f"{name}.{key}", parameter


def batch_of(shape: Shape, size: int, length: int) -> dict[str, Tensor]:
    """Random sequences with labels, the same ones every time."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (size, length), generator=random)
    labels = torch.randint(2, (size,), generator=random) if shape.kind == "encoder" else tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def in_parts(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch as smaller ones of `size` examples."""
    examples = len(batch["labels"])
    return [{key: tensor[i : i + size] for key, tensor in batch.items()} for i in range(0, examples, size)]
