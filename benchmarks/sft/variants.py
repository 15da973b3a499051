"""What `examples/sft.py` does, with more ways to choose the child network.

python -m benchmarks.sft.variants --data folder --columns meaning text --choose lowest
python -m benchmarks.sft.variants --data folder --columns meaning text --choose-from other question answer
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from trl import SFTTrainer

from benchmarks.grid.scores import turned_round
from benchmarks.sft.script import sft
from peft_child import estimate_fisher, select_child_network, weight_magnitudes


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train with each seed; returns the results."""
    parser = sft.parse_arguments()
    parser.set_defaults(variant="task_driven")  # only such a child network is chosen
    parser.add_argument("--choose", choices=CHOICES, default="highest", help="how the child network is chosen")
    parser.add_argument("--choose-from", nargs="+", default=[], help="other data, and its two columns, to choose from")
    args = sft.with_learning_rate(parser.parse_args(argv))
    return [sft.run(args, seed, choose) for seed in args.seeds]


def choose(trainer: Any, args: Namespace) -> None:
    """The child network that `args.choose` names, of the rows to train on or of others."""
    scores = CHOICES[args.choose](trainer.model, rows_to_choose_from(trainer, args), args)
    print(select_child_network(trainer.model, scores=scores))


def rows_to_choose_from(trainer: Any, args: Namespace) -> Any:
    """Batches of the training rows, or of those of another data set, prepared alike."""
    if not args.choose_from:
        return trainer.get_train_dataloader()
    *data, prompt, completion = args.choose_from
    rows, _ = sft.load_rows(Namespace(**{**vars(args), "data": data, "columns": [prompt, completion]}))
    other = SFTTrainer(trainer.model, trainer.args, train_dataset=rows, processing_class=trainer.processing_class)
    return other.get_train_dataloader()


def highest(model: Any, rows: Any, args: Namespace) -> Any:
    """Fisher information."""
    return estimate_fisher(model, rows, num_examples=args.num_fisher_examples, progress_bar=False)


def lowest(model: Any, rows: Any, args: Namespace) -> Any:
    """The smallest Fisher information, to see whether it matters which entries are chosen."""
    return turned_round(highest(model, rows, args))


def magnitude(model: Any, rows: Any, args: Namespace) -> Any:
    """The largest weights; of channels, the largest mean square."""
    return weight_magnitudes(model)


CHOICES = {"highest": highest, "lowest": lowest, "magnitude": magnitude}


if __name__ == "__main__":
    main()
