"""A tiny encoder with a tokenizer, and tiny tasks in files, as the GLUE scripts take them."""

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .problems import tiny_bert


WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "here", "there"]


def save_model(folder):
    """A model folder."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    tiny_bert().bert.save_pretrained(folder)
    return folder


def save_task(folder, task, training_rows=40, validation_rows=10):
    """Files of a task: CoLA has one text, the others two; labels are floats, names, or two or three numbers."""
    labels = {
        "stsb": [0.0, 1.5, 3.0, 5.0],
        "mnli": [0, 1, 2],
        "snli": [0, 1, 2],
        "sick": [0, 1, 2],
        "mine": ["yes", "no"],
    }
    draw = random.Random(task)
    (folder / task).mkdir(parents=True)
    for split, count in {"train": training_rows, "validation": validation_rows}.items():
        rows = []
        for _ in range(count):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) for _ in range(1 if task == "cola" else 2)]
            names = ["sentence"] if task == "cola" else ["sentence1", "sentence2"]
            rows.append({**dict(zip(names, texts, strict=True)), "label": draw.choice(labels.get(task, [0, 1]))})
        (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder
