"""A tiny language model with a tokenizer, and tiny tasks in files, as the SFT scripts take them."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .problems import tiny_llama


WORDS = [f"w{number}" for number in range(40)]


def word_tokenizer(words=WORDS):
    """A tokenizer of whole words."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = "{% for message in messages %}{{ message['content'] + ' </s> ' }}{% endfor %}"
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, model_input_names=inputs, **special
    )


def save_language_model(folder):
    """A model folder."""
    word_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    return folder


def save_rows(folder, task, columns, training_rows=40, held_out_rows=10):
    """train.jsonl and test.jsonl of a task, in which the completion repeats the prompt."""
    draw = random.Random(task)
    (folder / task).mkdir(parents=True)
    for split, count in {"train": training_rows, "test": held_out_rows}.items():
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) for _ in range(count)]
        rows = [json.dumps(dict.fromkeys(columns, text)) for text in texts]
        (folder / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder
