"""Fine-tune a model on a GLUE-style task with the Trainer: Child-Tuning, or what to compare it with.

    python examples/glue.py --task mrpc --bf16
    python examples/glue.py --task mrpc --method lora --seeds 1 2 3 --results results.jsonl
    python examples/glue.py --task snli --dataset stanfordnlp/snli --max-train-examples 5000
    python examples/glue.py --task mine --data folder --columns question answer --model ./my-encoder

Own rows are JSON lines with one or two texts and `label`, here in folder/mine/train.jsonl and validation.jsonl. Labels
are names, whole numbers (of classes; -1 is a row without a label), true and false, or floats for a regression.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import peft
import torch
import transformers
from datasets import ClassLabel, Dataset, Value, load_dataset
from peft import LoraConfig, ShiraConfig, get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.utils.data import DataLoader
from transformers.utils import is_torch_bf16_gpu_available

import peft_child
from peft_child import ChildTuningConfig, keep_largest, select_child_network


LEARNING_RATES = {"full": 5e-5, "child": 3e-4, "task_free": 1e-4, "random": 3e-4, "lora": 5e-4, "shira": 3e-4}
VARIANTS = {"child": "task_driven", "task_free": "task_free", "random": "random"}
STRINGS = ("string", "large_string")
LABELS = (*STRINGS, "bool", "int", "uint", "float")
VERSIONS = {module.__name__: module.__version__ for module in (torch, transformers, peft, peft_child)}


def main(argv=None):
    """Train with each seed; returns the results, which also go to the file of results."""
    args = parse_arguments().parse_args(argv)
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.method]
    check_output(args)
    if not sys.stderr.isatty():  # bars are for terminals
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    results = [run(args, seed) for seed in args.seeds]
    for name in results[0]["metrics"]:
        values = [result["metrics"][name] for result in results]
        spread = f", standard deviation {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{name}: {np.mean(values):.4f}{spread}")
    return results


def check_output(args):
    """Say which model will be replaced. An adapter beside a whole model would be loaded on top of that one."""
    kinds = {"a whole model": "config.json", "an adapter": "adapter_config.json"}
    own = "a whole model" if args.method == "full" else "an adapter"
    found = [kind for kind, name in kinds.items() if Path(args.output, name).exists()]
    if other := set(found) - {own}:
        raise SystemExit(
            f"--output must not mix {own} with {other.pop()}, as in '{args.output}'; name another folder."
        )
    if found:
        print(f"'{args.output}' has {own}, which will be replaced; --output names another folder.")


def run(args, seed):
    """Train with one seed, evaluate and save."""
    start = time.perf_counter()
    trainer = train(args, seed)
    metrics = {"metrics": evaluate(trainer, trainer.eval_dataset, args.task)}
    for density in args.keep:
        print(keep_largest(trainer.model, density))
        metrics.setdefault("kept", {})[str(density)] = evaluate(trainer, trainer.eval_dataset, args.task)
    return record(args, seed, trainer, start, metrics)


def record(args, seed, trainer, start, measured):
    """Save the model, and write and return the result, with all that is needed to get it again."""
    trainer.model.save_pretrained(args.output)
    trainer.processing_class.save_pretrained(args.output)
    saved = Path(args.output, "model.safetensors" if args.method == "full" else "adapter_model.safetensors")
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "results", "output")}
    is_folder = Path(args.model).is_dir()  # of folders only the name, the rest belongs to this machine
    settings |= {"model": Path(args.model).name if is_folder else args.model, "data": args.data and args.data.name}
    result = {
        **{"task": args.task, "method": args.method, "seed": seed, **measured},
        "entries": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "bytes": saved.stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
        **{"settings": settings, "threads": torch.get_num_threads(), "versions": VERSIONS},
    }
    line = json.dumps(result)
    print(line)
    if args.results:
        with args.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return result


def choose(model, examples, args):
    """The child network of the task."""
    print(select_child_network(model, examples, num_examples=args.num_fisher_examples))


def train(args, seed, choose=choose):
    """A trainer that has trained; its `eval_dataset` is what to evaluate on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    data, validation, _ = load_data(args, seed)
    head = head_of(data.features["label"])
    data, validation = (encode(rows, tokenizer, args.max_length) for rows in (data, validation))
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, **head, dtype=torch.float32)
    if args.method != "full":
        model = get_peft_model(model, adapter_config(model, args, seed))
    collator = transformers.DataCollatorWithPadding(tokenizer)
    settings = transformers.TrainingArguments(
        args.output,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,  # as a share of all steps
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        bf16=args.bf16,
        use_cpu=args.bf16 and not is_torch_bf16_gpu_available(),
        seed=seed,
    )
    if args.method == "child":
        examples = DataLoader(data, shuffle=True, collate_fn=collator)  # one at a time, so without padding
        choose(model.to(settings.device), examples, args)
    trainer = transformers.Trainer(model, settings, collator, data, validation, processing_class=tokenizer)
    trainer.train()
    return trainer


def adapter_config(model, args, seed):
    """The configuration of an adapter for all linear layers but the head."""
    common = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    if args.method == "lora":
        return LoraConfig(r=8, **common)
    if args.method == "shira":  # of each matrix r times (rows + columns) entries, in all as many as the density says
        shapes = [module.weight.shape for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        rank = args.density * sum(rows * columns for rows, columns in shapes) / sum(map(sum, shapes))
        return ShiraConfig(r=max(1, round(rank)), random_seed=seed, **common)
    return ChildTuningConfig(
        variant=VARIANTS[args.method], density=args.density, granularity=args.granularity, seed=seed, **common
    )


def load_data(args, seed):
    """Rows to train on and to evaluate on, and the number of labels (1 is a regression)."""
    data = read_split(args, "train")
    kind = kind_of_labels(data)
    data = with_labels(data, kind)
    if args.hold_out:  # always the same rows, whatever the seed and the number of rows to train on
        data, validation = data.train_test_split(args.hold_out, seed=0).values()
    else:
        validation = with_labels(read_split(args, "validation"), kind)
    texts, others = texts_of(data), texts_of(validation)
    if texts != others:
        raise SystemExit(
            f"Training and validation rows must have the same texts; got {', '.join(texts)} and {', '.join(others)}. "
            "Name those to read with --columns."
        )
    names = getattr(kind, "names", [])
    print(f"texts: {', '.join(texts)}\nlabels: {', '.join(names) or 'floats, for a regression'}")
    return data.shuffle(seed).take(min(args.max_train_examples or len(data), len(data))), validation, len(names) or 1


def read_split(args, split):
    """The texts and labels of a split, of the rows that have a label."""
    if args.data:
        place = f"{args.data / args.task / split}.jsonl"
        rows = read(Path(place))
    else:
        names = args.dataset or ("nyu-mll/glue", args.task)
        splits = load_dataset(*names)
        rows = splits[next(name for name in splits if name.startswith(split))]  # of MNLI's two the matched one
        place = f"{split} of {' '.join(names)}"
    if not is_any(rows.features.get("label"), *LABELS):
        raise SystemExit(f"Rows must have names or numbers in a column 'label'; '{place}' has {described(rows)}.")
    rows = rows.select_columns([*text_columns(args, rows, place), "label"])
    for name in rows.column_names:
        values = rows[name][:]
        if None in values:
            raise SystemExit(f"Every row must have a '{name}'; row {values.index(None) + 1} of '{place}' has none.")
    return labelled(rows, place) if is_any(rows.features["label"], "int", "uint") else rows


def read(file):
    """The rows of a file of JSON lines."""
    if not file.is_file():
        raise SystemExit(
            f"--data must be a folder with TASK/train.jsonl and TASK/validation.jsonl; there is no file '{file}'."
        )
    lines = enumerate(file.read_bytes().split(b"\n"), 1)
    rows = [parse(line, f"line {number} of '{file}'") for number, line in lines if line.strip()]
    if not rows:
        raise SystemExit(f"'{file}' has no rows.")
    try:
        return Dataset.from_list(rows)
    except (TypeError, ValueError) as error:  # of Arrow
        raise SystemExit(f"A column must have values of one kind; in '{file}': {error}") from None


def parse(line, place):
    """A line of JSON as a row."""
    try:
        row = json.loads(line)
    except ValueError:  # of JSON, or of UTF-8
        row = None
    if not isinstance(row, dict):
        text = line.decode(errors="replace").strip()
        raise SystemExit(
            f'Each line must be a JSON object, {{"text": "...", "label": "..."}}; got {text[:60]!r} in {place}.'
        )
    return row


def is_any(feature, *kinds):
    """Whether a column has values of one of these kinds."""
    return isinstance(feature, (Value, ClassLabel)) and feature.dtype.startswith(kinds)


def described(rows):
    """The columns of rows and their kinds."""
    return ", ".join(f"{name} ({getattr(feature, 'dtype', 'several')})" for name, feature in rows.features.items())


def text_columns(args, rows, place):
    """The columns that were named, or all of strings."""
    strings = [name for name, feature in rows.features.items() if name != "label" and is_any(feature, *STRINGS)]
    texts = args.columns or strings
    if not set(texts) <= set(strings) or not 1 <= len(texts) <= 2:
        raise SystemExit(
            f"One or two columns of strings must be read; got {', '.join(texts) or 'none'} in '{place}', which has "
            f"{described(rows)}. Name the columns with --columns."
        )
    return texts


def texts_of(rows):
    """The columns to read."""
    return [name for name in rows.column_names if name != "label"]


def labelled(rows, place):
    """The rows whose label is not -1, as SNLI has it where annotators disagree."""
    least = min(rows["label"][:])
    if least < -1:
        raise SystemExit(f"Whole numbers as labels must be 0 or more, or -1 for no label; got {least} in '{place}'.")
    if least == -1:
        print(f"rows of '{place}' with the label -1 are left out: they have none")
    return rows.filter(lambda label: label >= 0, input_columns="label")


def kind_of_labels(rows):
    """What the labels of training rows are: classes by their names, or floats."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel) or is_any(feature, "float"):
        return feature
    values = sorted(rows.unique("label"))
    if len(values) < 2:
        raise SystemExit(
            f"There must be two different labels or more in the training rows; got {', '.join(map(str, values))}."
        )
    return ClassLabel(names=[value if isinstance(value, str) else json.dumps(value) for value in values])


def with_labels(rows, kind):
    """The rows with numbers of classes, or floats, as labels."""
    feature = rows.features["label"]
    if feature == kind:
        return rows
    if isinstance(kind, ClassLabel):
        rows = rows.cast_column("label", Value("string"))
        if unknown := set(rows.unique("label")) - set(kind.names):
            raise SystemExit(
                f"Labels of validation rows must be among those of the training rows, {', '.join(kind.names)}; "
                f"got {', '.join(sorted(unknown))}."
            )
    elif not is_any(feature, "float", "int", "uint"):
        raise SystemExit(
            f"Labels of validation rows must be numbers, as those of the training rows; got {feature.dtype}."
        )
    return rows.cast_column("label", kind)


def head_of(feature):
    """The settings of the head for labels: the names of the classes, or one output."""
    if not isinstance(feature, ClassLabel):
        return {"num_labels": 1}
    names = dict(enumerate(feature.names))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def encode(rows, tokenizer, max_length):
    """Tokens and labels of rows."""
    texts = texts_of(rows)

    def tokens(batch):
        return {**tokenizer(*(batch[name] for name in texts), truncation=True, max_length=max_length)}

    encoded = rows.map(tokens, batched=True).rename_column("label", "labels")
    return encoded.select_columns([*tokenizer.model_input_names, "labels"])


def evaluate(trainer, rows, task):
    """The metrics of a task on rows, by name."""
    outputs, labels, _ = trainer.predict(rows)
    return glue_metrics(task, outputs, labels)


def glue_metrics(task, outputs, labels):
    """The metrics that GLUE has for a task; accuracy, or correlations in a regression, for others."""
    if outputs.shape[-1] == 1:  # 0 if all outputs are equal
        correlations = {"pearson": pearsonr, "spearman": spearmanr}
        values = {name: correlate(outputs.squeeze(-1), labels).statistic for name, correlate in correlations.items()}
        return {name: float(np.nan_to_num(value)) for name, value in values.items()}
    predicted = outputs.argmax(-1)
    if task == "cola":
        return {"matthews": float(matthews_corrcoef(labels, predicted))}
    f1 = {"f1": float(f1_score(labels, predicted))} if task in ("mrpc", "qqp") else {}
    return {"accuracy": float(accuracy_score(labels, predicted)), **f1}


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="bert-base-cased", help="model on the Hub or local folder")
    add("--task", default="mrpc", help="GLUE task on the Hub, or a name for --dataset, or a folder in --data")
    add("--dataset", nargs="+", help="other dataset on the Hub, and its configuration if it has several")
    add("--data", type=Path, help="folder with TASK/train.jsonl and TASK/validation.jsonl instead of the Hub")
    add("--columns", nargs="+", default=[], metavar="TEXT", help="one or two columns to read; if none, all of strings")
    add("--max-train-examples", type=int, help="train on so many rows, drawn with the seed; all if not given")
    add("--hold-out", type=float, help="evaluate on this share of the training rows instead, never trained on")
    add("--max-length", type=int, default=128, help="longest example, in tokens")
    add("--granularity", choices=["entry", "input_channel"], default="entry", help="what a child network consists of")
    add("--method", choices=LEARNING_RATES, default="child", help="what to train")
    add("--density", type=float, default=0.1, help="share of the child network, of SHiRA, or of gradients")
    add("--num-fisher-examples", type=int, default=128, help="training rows that choose the child network")
    add("--keep", type=float, nargs="*", default=[], help="after training keep such a share of all targeted entries")
    add("--learning-rate", type=float, help=f"peak of the schedule; if not given, by method: {LEARNING_RATES}")
    add("--epochs", type=float, default=3, help="passes over the training rows")
    add("--batch-size", type=int, default=16, help="examples in a training step")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast); the trained entries stay float32")
    add("--seeds", type=int, nargs="+", default=[42], help="of rows, head, order, dropout and masks; a run for each")
    add("--results", type=Path, help="JSONL file to append the results to")
    add("--output", default="runs/glue", help="folder for what was trained last")
    return parser


if __name__ == "__main__":
    main()
