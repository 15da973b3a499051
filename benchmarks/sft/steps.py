"""Seconds of a training step beside those of LoRA with r = 16, which takes turns with it.

python -m benchmarks.sft.steps --data folder --columns meaning text --method child --variant random --density 0.01
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.measure import take_turns
from benchmarks.sft.script import sft


QUICK = {"steps": 1, "held_out": 1, "held_out_old": 1, "evaluate_every": 0}  # what is learnt does not matter here


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure with each seed; returns the seconds of every turn."""
    parser = sft.parse_arguments()
    parser.add_argument("--turns", type=int, default=9, help="measured steps of each")
    args = sft.with_learning_rate(parser.parse_args(argv))
    return [run(args, seed) for seed in args.seeds]


def run(args: Namespace, seed: int) -> dict[str, Any]:
    """Steps of the method and of LoRA on the same batch, in turns."""
    start = time.perf_counter()
    own = Namespace(**(vars(args) | QUICK))
    peer = Namespace(**(vars(own) | {"method": "lora", "rank": 16}))
    trainers = {name: sft.train(settings, seed)[0] for name, settings in (("own", own), ("lora", peer))}
    batch = next(iter(trainers["own"].get_train_dataloader()))
    work = {name: {"step": partial(step, trainer, batch)} for name, trainer in trainers.items()}
    result = {
        **{"seed": seed, "tokens": batch["input_ids"].numel()},
        "steps": {name: found["step"] for name, found in take_turns(work, args.turns).items()},
        **{"seconds": round(time.perf_counter() - start, 1), "versions": sft.VERSIONS},
    }
    print(json.dumps(result))
    return result


def step(trainer: Any, batch: dict[str, Tensor]) -> None:
    """Forward, backward, clipping as in the Trainer, and the optimizer."""
    trainer.training_step(trainer.model, dict(batch))
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()


if __name__ == "__main__":
    main()
