"""Fine-tune a language model on rows of your own with TRL: Child-Tuning, or what to compare it with.

    python examples/sft.py --data rows.jsonl --columns question answer --density 0.01
    python examples/sft.py --data openai/gsm8k main --columns question answer --method lora
    python examples/sft.py --data folder --columns meaning text --old-text notes.txt --results results.jsonl

Rows are JSON lines: with a prompt and a completion in two columns, or with what TRL takes by itself (`text`,
`messages`, or `prompt` and `completion`). A folder has train.jsonl and test.jsonl; of a single file up to a fifth is
held out. What the model has learnt is its loss on held-out rows; what it has forgotten is its loss on text that it
knew before.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import peft
import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from peft import LoraConfig, ShiraConfig
from transformers.utils import is_torch_bf16_gpu_available

import peft_child
from peft_child import ChildTuningConfig, select_child_network


LEARNING_RATES = {"full": 1e-4, "task_driven": 3e-4, "random": 1e-3, "task_free": 1e-4, "lora": 1e-3, "shira": 1e-3}
SPARSE = {"task_driven": 1e-3, "random": 1e-2}  # at a density of 0.03 or less
VERSIONS = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl, peft_child)}
OLD_TOKENS = 256  # of one example of old text


def main(argv=None):
    """Train with each seed; returns the results, which also go to the file of results."""
    args = with_learning_rate(parse_arguments().parse_args(argv))
    check_output(args)
    if not sys.stderr.isatty():  # bars are for terminals
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    return [run(args, seed) for seed in args.seeds]


def with_learning_rate(args):
    """The settings, with the usual learning rate if none was given."""
    kind = args.variant if args.method == "child" else args.method
    rates = LEARNING_RATES | (SPARSE if args.density <= 0.03 else {})
    args.learning_rate = args.learning_rate or rates[kind]
    return args


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


def choose(trainer, args):
    """The child network of the rows."""
    rows = trainer.get_train_dataloader()
    print(select_child_network(trainer.model, rows, num_examples=args.num_fisher_examples))


def run(args, seed, choose=choose):
    """Train with one seed, measure and save."""
    start = time.perf_counter()
    trainer, progress = train(args, seed, choose)
    return record(args, seed, trainer, progress, start)


def record(args, seed, trainer, progress, start):
    """Save the model, and write and return the result, with all that is needed to get it again."""
    trainer.save_model(args.output)
    saved = Path(args.output).glob("model*.safetensors" if args.method == "full" else "adapter_model*.safetensors")
    left_out = ("seeds", "results", "output")
    settings = {name: without_folder(value) for name, value in vars(args).items() if name not in left_out}
    result = {
        **{"method": args.method, "seed": seed, "curve": progress.curve},
        "metrics": dict(zip(("new", "old"), progress.curve[-1][1:], strict=True)),
        "entries": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "bytes": sum(file.stat().st_size for file in saved),
        "seconds_per_step": round(statistics.median(progress.durations or [0]), 3),
        "peak_bytes": peak_memory(),
        "seconds": round(time.perf_counter() - start, 1),
        **{"settings": settings, "threads": torch.get_num_threads(), "versions": VERSIONS},
    }
    line = json.dumps(result)
    print(line)
    if args.results:
        with args.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    (_, new, old), metrics = progress.curve[0], result["metrics"]
    print(
        f"loss on new text {new:.3f} -> {metrics['new']:.3f}, on old text {old:.3f} -> {metrics['old']:.3f}\n"
        f"{result['entries']:,} trained values, {result['bytes'] / 1e6:.1f} MB in {args.output}\n"
        f"{result['seconds_per_step']:.2f} s per step, at most {result['peak_bytes'] / 1e9:.1f} GB of memory"
    )
    return result


def without_folder(setting):
    """A setting, of files and folders the name alone, since the rest belongs to this machine."""
    if isinstance(setting, list):
        return [without_folder(each) for each in setting]
    is_path = isinstance(setting, (str, Path)) and Path(setting).exists()
    return Path(setting).name if is_path else setting


def train(args, seed, choose=choose):
    """A trainer that has trained, and the course of it."""
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if args.chat and not tokenizer.chat_template:
        raise SystemExit(f"The tokenizer of '{args.model}' has no chat template, so leave --chat out.")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attention
    )
    rows, held_out = load_rows(args)
    settings = trl.SFTConfig(
        args.output,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,  # as a share of all steps
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        train_sampling_strategy="group_by_length",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        gradient_checkpointing=args.gradient_checkpointing,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=args.bf16,
        use_cpu=args.bf16 and not is_torch_bf16_gpu_available(),
        seed=seed,
    )
    trainer = trl.SFTTrainer(
        model, settings, None, rows, held_out, tokenizer, peft_config=adapter_config(model, args, seed)
    )
    if args.method == "child" and args.variant == "task_driven":
        choose(trainer, args)
    progress = Progress(trainer, old_examples(args, tokenizer), args.evaluate_every)
    trainer.add_callback(progress)
    trainer.train()
    progress.measure(trainer.state.global_step)
    return trainer, progress


def adapter_config(model, args, seed):
    """The configuration of an adapter for all linear layers but the head; None for full fine-tuning."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if args.method == "full":
        return None
    if args.method == "lora":
        return LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common)
    if args.method == "shira":  # of each matrix r times (rows + columns) entries, in all as many as the density says
        linear = [module.weight.shape for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
        rank = args.density * sum(rows * columns for rows, columns in linear) / sum(map(sum, linear))
        return ShiraConfig(r=max(1, round(rank)), random_seed=seed, **common)
    return ChildTuningConfig(
        variant=args.variant, density=args.density, granularity=args.granularity, seed=seed, **common
    )


class Progress(transformers.TrainerCallback):
    """What is learnt and forgotten along the way, and how long steps take.

    Attributes:
        curve: Lists of the step, the loss on new text and the loss on old text, the base model first.
        durations: Seconds of each training step.
    """

    def __init__(self, trainer, old, every):
        self.trainer, self.old, self.every = trainer, old, every
        self.curve, self.durations = [], []
        self.measure(0)

    def measure(self, step):
        """Add a point to the curve, unless it has one of this step."""
        if not self.curve or self.curve[-1][0] != step:
            losses = (mean_loss(self.trainer, rows) for rows in (self.trainer.eval_dataset, self.old))
            self.curve.append([step, *(round(loss, 4) for loss in losses)])

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, and measure if it is time to."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.start)
        if self.every and state.global_step % self.every == 0:
            self.measure(state.global_step)


@torch.no_grad()
def mean_loss(trainer, rows):
    """The mean negative log-likelihood of a token, in nats: of completions, or of whole texts."""
    model, device = trainer.model, trainer.args.device
    was_training = model.training
    model.eval()
    total = count = 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for batch in torch.utils.data.DataLoader(rows, 8, collate_fn=trainer.data_collator):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        inputs = {name: values.to(device) for name, values in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.args.bf16):
            total += tokens * float(model(**inputs).loss)
        count += tokens
    model.train(was_training)
    return total / count


def load_rows(args):
    """Rows to train on, and rows that are held out, in the columns that TRL knows."""
    path = Path(args.data[0])
    if path.is_file() or path.suffix in (".json", ".jsonl", ".csv"):
        splits = {"train": read(path)}
    elif path.is_dir():
        splits = {name: read(path / f"{name}.jsonl") for name in ("train", "test")}
    else:
        splits = load_dataset(*args.data)
    test = next((name for name in ("test", "validation") if name in splits), None)
    if test is None:  # hold out what was asked for, but not more than a fifth
        count = max(1, min(args.held_out, len(splits["train"]) // 5))
        splits, test = splits["train"].train_test_split(count, seed=0), "test"
    rows, held_out = splits["train"], splits[test].shuffle(seed=0)
    held_out = held_out.take(min(args.held_out, len(held_out)))
    print(f"{len(rows):,} rows to train on, {len(held_out):,} held out")
    return tuple(prompts_and_completions(part, args) for part in (rows, held_out))


def read(file):
    """The rows of a file of JSON lines."""
    if not file.is_file():
        raise SystemExit(
            f"--data must be a JSONL file, a folder with train.jsonl and test.jsonl, or a name on the Hub; "
            f"there is no file '{file}'."
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
        raise SystemExit(f'Each line must be a JSON object, {{"text": "..."}}; got {text[:60]!r} in {place}.')
    return row


def prompts_and_completions(rows, args):
    """Rows of a prompt and a completion, made of the two columns that were named."""
    if not args.columns:
        if not {"text", "messages", "prompt"} & set(rows.column_names):
            raise SystemExit(f"Name the columns of the prompt and the completion with --columns: {rows.column_names}.")
        return rows
    first, second = args.columns
    if missing := {first, second} - set(rows.column_names):
        raise SystemExit(f"--columns must name columns of the rows, {rows.column_names}; got {', '.join(missing)}.")

    def convert(row):
        if args.chat:
            roles = (("prompt", "user", row[first]), ("completion", "assistant", row[second]))
            return {name: [{"role": role, "content": content}] for name, role, content in roles}
        return {"prompt": f"{row[first]}\n", "completion": row[second]}

    return rows.map(convert, remove_columns=rows.column_names)


def old_examples(args, tokenizer):
    """Examples of text that the model knew before, all of the same length and spread over the whole text."""
    text = "\n\n".join(
        [file.read_text("utf-8") for file in args.old_text] or [topics[name] for name in sorted(topics)]
    )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    examples = [tokens[start : start + OLD_TOKENS] for start in range(0, len(tokens) - OLD_TOKENS + 1, OLD_TOKENS)]
    if not examples:
        raise SystemExit(f"The old text needs at least {OLD_TOKENS} tokens, it has {len(tokens)}.")
    return [{"input_ids": example} for example in examples[:: max(1, len(examples) // args.held_out_old)]]


def peak_memory():
    """The most memory that was in use: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model on the Hub or local folder")
    add(
        "--data",
        nargs="+",
        required=True,
        help="JSONL file, folder with train.jsonl and test.jsonl, or name on the Hub",
    )
    add("--columns", nargs=2, metavar=("PROMPT", "COMPLETION"), help="if they have other names than TRL's")
    add("--chat", action="store_true", help="write the prompt and the completion with the chat template of the model")
    add("--old-text", nargs="*", type=Path, default=[], help="files that the model knows; if none, Python's help")
    add("--method", choices=["child", "full", "lora", "shira"], default="child", help="what to train")
    add("--variant", choices=["random", "task_driven", "task_free"], default="random", help="of the child network")
    add("--granularity", choices=["entry", "input_channel"], default="entry", help="what a child network consists of")
    add("--density", type=float, default=0.1, help="share of the child network, or of SHiRA")
    add("--num-fisher-examples", type=int, default=32, help="training rows that choose the child network")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--learning-rate", type=float, help="peak of the schedule; if not given, what is usual for the method")
    add("--steps", type=int, default=200, help="training steps")
    add("--batch-size", type=int, default=8, help="rows in a training step")
    add("--max-length", type=int, default=512, help="longest row, in tokens")
    add("--held-out", type=int, default=256, help="rows to measure the loss on new text with")
    add("--held-out-old", type=int, default=32, help=f"about so many pieces of {OLD_TOKENS} tokens of old text")
    add("--evaluate-every", type=int, default=0, help="measure both losses after so many steps; 0 is at the end alone")
    add(
        "--attention", default="sdpa", help="implementation of transformers; short rows on a CPU are faster with eager"
    )
    add("--gradient-checkpointing", action="store_true", help="compute activations twice, to save memory")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast); the trained values stay float32")
    add("--seeds", type=int, nargs="+", default=[42], help="of the order, LoRA and the masks; a run for each")
    add("--results", type=Path, help="JSONL file to append the results to")
    add("--output", default="runs/sft", help="folder for what was trained last")
    return parser


if __name__ == "__main__":
    main()
