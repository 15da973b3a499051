"""Two tasks in one model: adapters trained apart, put together with `add_weighted_adapter`.

python -m benchmarks.sft.combine --data first --columns meaning text --second other question answer --method lora
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.sft.script import sft


NAMES = ["first", "second"]
COMBINATIONS: dict[str, dict[str, Any]] = {
    "mean": {"weights": [0.5, 0.5], "combination_type": "linear"},
    "sum": {"weights": [1.0, 1.0], "combination_type": "linear"},
    "TIES": {"weights": [1.0, 1.0], "combination_type": "ties", "density": 0.5},
    "DARE": {"weights": [1.0, 1.0], "combination_type": "dare_linear", "density": 0.5},
}
# Input channels are combined whole: without DARE, which drops entries, and with TIES only over signs.
OF_CHANNELS = {**COMBINATIONS, "TIES": {**COMBINATIONS["TIES"], "density": 1.0}}
del OF_CHANNELS["DARE"]
# LoRA's "linear" adds the factors themselves, so that products of one task's with the other's come in; "cat" does not.
OF_LORA: dict[str, dict[str, Any]] = {
    "exact mean": {"weights": [0.5, 0.5], "combination_type": "cat"},
    "exact sum": {"weights": [1.0, 1.0], "combination_type": "cat"},
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, combine and measure with each seed; returns the losses."""
    parser = sft.parse_arguments()
    add = parser.add_argument
    add("--second", nargs="+", required=True, help="the data of the second task, and its two columns")
    add("--second-learning-rate", type=float, required=True, help="peak of the schedule in the second task")
    args = parser.parse_args(argv)
    return [run(args, seed) for seed in args.seeds]


def run(args: Namespace, seed: int) -> dict[str, Any]:
    """Train an adapter for each task, and measure every combination on both tasks and on old text."""
    start = time.perf_counter()
    *data, prompt, completion = args.second
    second = {"data": data, "columns": [prompt, completion], "learning_rate": args.second_learning_rate}
    folders = [Path(args.output) / name for name in NAMES]
    tasks = [Namespace(**{**vars(args), "output": str(folders[0])})]
    tasks.append(Namespace(**{**vars(args), **second, "output": str(folders[1])}))
    trainers, curves = [], {}
    for place, (name, own) in enumerate(zip(NAMES, tasks, strict=True)):
        trainer, progress = sft.train(own, seed + 1000 * place)  # with one seed both LoRAs would have the same A
        trainer.save_model(own.output)
        trainers.append(trainer)
        curves[name] = progress.curve
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32", attn_implementation=args.attention)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="first")
    model.load_adapter(folders[1], "second")
    model.to(trainers[0].args.device)
    for trainer in trainers:
        trainer.model = model
    old = sft.old_examples(args, trainers[0].processing_class)
    texts = [(trainer, trainer.eval_dataset) for trainer in trainers] + [(trainers[0], old)]
    measured = {}
    of_child = OF_CHANNELS if args.granularity == "input_channel" else COMBINATIONS
    combinations = COMBINATIONS | OF_LORA if args.method == "lora" else of_child
    for name, settings in {**dict.fromkeys(NAMES), **combinations}.items():
        if settings:
            transformers.set_seed(seed)  # DARE drops at random
            model.add_weighted_adapter(adapters=NAMES, adapter_name=name, **settings)
        model.set_adapter(name)
        measured[name] = [round(sft.mean_loss(*text), 4) for text in texts]
    result = {
        **{
            "method": args.method,
            "seed": seed,
            "base": [*(curves[name][0][1] for name in NAMES), curves["first"][0][2]],
        },
        **{"combined": measured, "seconds": round(time.perf_counter() - start, 1), "versions": sft.VERSIONS},
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
