"""Fine-tune a model on a GLUE task with the Trainer: Child-Tuning, or LoRA or all weights to compare with.

    python examples/glue.py --task mrpc --bf16

Own rows come as JSON lines with `label` and either `sentence` or both `sentence1` and `sentence2`; the task then says
which metric they are judged by. Needs transformers 5.2 or newer.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.utils.data import DataLoader
from transformers.utils import is_torch_bf16_gpu_available

from peft_child import ChildTuningConfig, keep_largest, select_child_network


TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
LEARNING_RATES = {"child": 3e-4, "task_free": 1e-4, "full": 5e-5, "lora": 5e-4}


def main() -> None:
    """Train, evaluate and save."""
    args = parse_arguments()
    transformers.set_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    train, validation = load_rows(args, tokenizer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels={"stsb": 1, "mnli": 3}.get(args.task, 2), dtype=torch.float32
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)

    if args.method == "child":
        config = ChildTuningConfig(density=args.density, target_modules="all-linear", task_type="SEQ_CLS")
        model = get_peft_model(model, config)
        examples = DataLoader(train, shuffle=True, collate_fn=collator)  # one at a time, so without padding
        print(select_child_network(model, examples, num_examples=args.num_fisher_examples))
    elif args.method == "task_free":
        config = ChildTuningConfig(
            variant="task_free", density=args.density, target_modules="all-linear", task_type="SEQ_CLS", seed=args.seed
        )
        model = get_peft_model(model, config)
    elif args.method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))

    settings = transformers.TrainingArguments(
        args.output,
        learning_rate=args.learning_rate or LEARNING_RATES[args.method],
        warmup_steps=0.1,  # as a share of all steps
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        bf16=args.bf16,
        use_cpu=args.bf16 and not is_torch_bf16_gpu_available(),
        seed=args.seed,
    )
    metrics = partial(glue_metrics, args.task)
    trainer = transformers.Trainer(model, settings, collator, train, validation, compute_metrics=metrics)
    trainer.train()
    print({name: round(value, 4) for name, value in trainer.evaluate().items()})
    for density in args.keep:
        print(keep_largest(model, density))
        print({name: round(value, 4) for name, value in trainer.evaluate().items()})
    model.save_pretrained(args.output)
    saved = Path(args.output, "model.safetensors" if args.method == "full" else "adapter_model.safetensors")
    print(f"{saved}: {saved.stat().st_size / 1e6:.2f} MB")


def load_rows(args, tokenizer):
    """Tokenized training and validation rows, from files or from the Hub."""
    if args.train_file:
        lines = (path.read_text("utf-8").strip().split("\n") for path in (args.train_file, args.validation_file))
        train, validation = (Dataset.from_list([json.loads(line) for line in rows]) for rows in lines)
    else:
        data = load_dataset("nyu-mll/glue", args.task)
        train, validation = data["train"], data["validation_matched" if args.task == "mnli" else "validation"]
    train = train.shuffle(args.seed).take(args.max_train_examples or len(train))
    texts = [name for name, feature in train.features.items() if feature.dtype == "string"]

    def encode(rows):
        encoded = tokenizer(*(rows[name] for name in texts), truncation=True, max_length=args.max_length)
        return {**encoded, "labels": rows["label"]}

    return [rows.map(encode, batched=True, remove_columns=rows.column_names) for rows in (train, validation)]


def glue_metrics(task, result):
    """The metrics of a task by name."""
    outputs, labels = result
    if task == "stsb":
        outputs = outputs.squeeze(-1)
        return {"pearson": pearsonr(outputs, labels).statistic, "spearman": spearmanr(outputs, labels).statistic}
    predicted = outputs.argmax(-1)
    if task == "cola":
        return {"matthews": matthews_corrcoef(labels, predicted)}
    accuracy = {"accuracy": accuracy_score(labels, predicted)}
    return accuracy | {"f1": f1_score(labels, predicted)} if task in ("mrpc", "qqp") else accuracy


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="bert-base-cased", help="model on the Hub or local folder (default: %(default)s)")
    add("--task", choices=TASKS, default="mrpc", help="GLUE task (default: %(default)s)")
    add("--train-file", type=Path, help="JSONL file of training rows instead of the Hub's")
    add("--validation-file", type=Path, help="JSONL file of validation rows, needed with --train-file")
    add("--max-train-examples", type=int, help="train on so many rows, taken at random (default: all)")
    add("--max-length", type=int, default=128, help="longest example, in tokens (default: %(default)s)")
    add("--method", choices=LEARNING_RATES, default="child", help="what to train (default: %(default)s)")
    add(
        "--density", type=float, default=0.1, help="share of the child network, or of gradients (default: %(default)s)"
    )
    add(
        "--keep",
        type=float,
        nargs="*",
        default=[],
        help="after training keep so large a share of the changes, and less",
    )
    add("--num-fisher-examples", type=int, default=512, help="examples that choose it (default: %(default)s)")
    add("--learning-rate", type=float, help=f"peak of the schedule (default by method: {LEARNING_RATES})")
    add("--epochs", type=float, default=3, help="passes over the training rows (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="examples in a training step (default: %(default)s)")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast); the trained entries stay float32")
    add("--seed", type=int, default=42, help="seed of the head, the order and dropout (default: %(default)s)")
    add("--output", default="runs/glue", help="folder for what was trained (default: %(default)s)")
    args = parser.parse_args()
    if (args.train_file is None) != (args.validation_file is None):
        parser.error("--train-file and --validation-file go together")
    return args


if __name__ == "__main__":
    main()
