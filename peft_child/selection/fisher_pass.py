"""The Fisher pass: a model's loss on every example of the task's data, and the model put back as it was."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_child.selection.batch_scorer import BatchScorer
from peft_child.selection.batches import batch_size, check_batch, labelled, some_examples, to_device
from peft_child.selection.squares import mean_squares, squaring, zeros_beside
from peft_child.tensors.distributed import check_can_add, gathered, in_step, is_sharded, rank, world_size
from peft_child.tensors.quantised import is_quantised
from peft_child.tuner.layer import child_tuning_layers


OVER_BATCHES = (
    "A loss over the whole batch, of pairs or with in-batch negatives, has no gradient for one example: pass "
    "split_batches=False."
)

Forward = Callable[[Any, Any], Any]


class Options(NamedTuple):
    """How to go through the data; see `estimate_fisher`."""

    num_examples: int | None = None
    forward_fn: Forward | None = None
    loss_fn: Forward | None = None
    split_batches: bool = True
    progress_bar: bool = True
    score_device: torch.device | str | None = None
    score_folder: str | Path | None = None


@dataclass
class FisherPass:
    """One pass over the data.

    Attributes:
        by_batch: Score batches as they come, with dropout and clipping, as the authors' code does.
        examples: Number of examples that were scored; in the end those of all processes together.
        skipped: Number of examples without a label, likewise; they say nothing, and their loss is the mean of nothing.
    """

    model: nn.Module
    dataloader: Iterable[Any]
    by_batch: bool
    options: Options
    examples: int = 0
    skipped: int = 0

    def scores(self, targets: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Fisher information of the targets, float32, in their shapes."""
        if self.options.num_examples is not None and self.options.num_examples < world_size():
            raise ValueError(
                f"num_examples must be None or at least the number of processes, {world_size()}; "
                f"got {self.options.num_examples}."
            )
        for name, parameter in targets.items():
            if is_quantised(parameter):
                raise ValueError(
                    f"'{name}' is quantised ({type(parameter).__name__}), and no gradient reaches it: estimate the "
                    "Fisher information in the base model as it was before, and pass it as scores=."
                )
        if any(parameter.dtype == torch.float16 for parameter in targets.values()):
            warnings.warn(
                "Gradients of float16 weights below 6e-8 become zero, and so does their Fisher information: load the "
                "base model in bfloat16 or float32 for the choice, and keep the scores (estimate_fisher).",
                stacklevel=4,
            )
        device = next(iter(targets.values())).device
        shared = any(is_sharded(parameter) for parameter in targets.values())
        if shared and not (self.options.score_device is self.options.score_folder is None):
            raise ValueError(
                "Scores of a sharded model stay with its shards; leave out score_device and score_folder."
            )
        if not shared:
            check_can_add(torch.device("cpu" if self.options.score_folder else self.options.score_device or device))
        with _scoring(self.model, targets.values(), training=self.by_batch):
            if shared:  # dropout must be the same on every rank, as the example is
                torch.manual_seed(gathered(torch.initial_seed())[0])
            found = mean_squares(targets, partial(self._add, targets, device, shared), shared, self._make_room)
        if not shared:
            self.examples, self.skipped = map(sum, zip(*gathered((self.examples, self.skipped)), strict=True))
        if self.skipped and not rank():
            warnings.warn(
                f"{self.skipped} examples have no label but -100; the Fisher information is that of the "
                f"{self.examples} others.",
                stacklevel=4,
            )
        return found

    def _make_room(self, name: str, parameter: Tensor) -> Tensor:
        if self.options.score_folder is not None:
            return _mapped_zeros(Path(self.options.score_folder), name, parameter.shape)
        if self.options.score_device is not None:
            return torch.zeros(parameter.shape, device=self.options.score_device)
        return zeros_beside(name, parameter)

    def _add(
        self, targets: Mapping[str, nn.Parameter], device: torch.device, shared: bool, sums: dict[str, Tensor]
    ) -> int:
        """Add the squared gradients of this rank's data, and count the losses."""
        scored = [0] * world_size()  # examples of each rank

        def left(rank: int) -> int:
            return (
                sys.maxsize
                if self.options.num_examples is None
                else _share(self.options.num_examples, rank) - scored[rank]
            )

        mine = None if self.options.num_examples is None else left(rank())
        total = _total(self.dataloader, mine) if self.options.split_batches else None
        silent = not self.options.progress_bar or rank() > 0
        losses = 0
        with tqdm(desc="Fisher information", unit=" examples", total=total, disable=silent) as bar:
            add = self._adder(targets, sums, bar.update)
            for source, batch in in_step(self._batches(), lambda rank: left(rank) <= 0, shared):
                batch = self._labelled(batch) if left(source) > 0 else None
                if batch is not None:
                    before = self.examples
                    losses += add(to_device(batch, device), left(source))
                    scored[source] += self.examples - before
        return losses

    def _adder(
        self, targets: Mapping[str, nn.Parameter], sums: dict[str, Tensor], show: Callable[[int], Any]
    ) -> Callable[[Any, int], int]:
        """What scores a batch, or at most so many of its examples, and counts the losses."""

        def count(examples: int) -> None:
            self.examples += examples
            show(examples)

        if self.by_batch or not self.options.split_batches:
            return partial(self._add_batch, targets, sums, count)
        at_once = not any(is_sharded(parameter) for parameter in self.model.parameters())
        scorer = BatchScorer(self.model, targets, sums, self._loss_of, self._loss, count, at_once)

        def add(batch: Any, limit: int) -> int:
            size = batch_size(batch)
            number = min(size, limit)
            scorer.add(some_examples(batch, range(number), size), number, self.examples)
            return number

        return add

    def _add_batch(
        self,
        targets: Mapping[str, nn.Parameter],
        sums: dict[str, Tensor],
        count: Callable[[int], None],
        batch: Any,
        limit: int,
    ) -> int:
        """Score a batch as it comes."""
        with squaring(targets, sums, 1.0 if self.by_batch else None) as square:
            square(self._loss(batch, self.examples))
        count(batch_size(batch) if self.options.split_batches else 1)
        return 1

    def _labelled(self, batch: Any) -> Any:
        """The examples of a batch that have labels, as far as it can be taken apart, or None if there are none."""
        kept, splits = labelled(batch), self.options.split_batches
        if kept is None or (kept and (self.by_batch or not splits)):
            return batch
        size = len(batch["labels"]) if splits else 1
        self.skipped += size - len(kept)
        return some_examples(batch, kept, size) if kept else None

    def _batches(self) -> Iterator[Any]:
        is_empty = True
        for batch in self.dataloader:
            is_empty = False
            if self.options.forward_fn is None:
                check_batch(batch)
            yield batch
        if is_empty:
            raise ValueError("The Fisher information needs at least one example, got none.")

    def _loss_of(self, example: Any) -> Any:
        """What there is in the place of the loss of an example or a batch."""
        if self.options.forward_fn is not None:
            output = self.options.forward_fn(self.model, example)
        else:
            output = self.model(**example)
        return self.options.loss_fn(output, example) if self.options.loss_fn is not None else _loss_in(output)

    def _loss(self, example: Any, number: int) -> Tensor:
        """The loss of an example, whose number is for errors."""
        loss = self._loss_of(example)
        if loss is None:
            keys = f" (they have {', '.join(map(str, example))})" if isinstance(example, Mapping) else ""
            raise ValueError(
                f"The model returned no loss for example {number}: batches need labels{keys}, or a loss_fn."
            )
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"The loss of every example must be finite; that of example {number} is {value}.")
        if not loss.requires_grad:
            raise ValueError(f"The loss of example {number} does not depend on any targeted weight. {OVER_BATCHES}")
        found: Tensor = loss
        return found


def _loss_in(output: Any) -> Tensor | None:
    """The loss in what a model returns, wherever the Trainer would find it as well."""
    if isinstance(output, Tensor):
        return output if not output.dim() else None
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple) and not hasattr(output, "loss") and output:
        return output[0] if isinstance(output[0], Tensor) and not output[0].dim() else None
    return getattr(output, "loss", None)


def _mapped_zeros(folder: Path, name: str, shape: torch.Size) -> Tensor:
    """Zeros in a new file that is mapped into memory, one for each process."""
    folder = folder / f"rank{rank()}" if world_size() > 1 else folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.float32"
    file.unlink(missing_ok=True)
    return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)


def _share(num_examples: int, rank: int) -> int:
    """The part of the examples that a rank scores; those that are left over go to the first ranks."""
    each, left = divmod(num_examples, world_size())
    return each + (rank < left)


def _total(dataloader: Iterable[Any], num_examples: int | None) -> int | None:
    dataset = getattr(dataloader, "dataset", None)
    available = (
        len(dataset) if isinstance(dataset, Sized) and world_size() == 1 else None
    )  # else it may be all shards'
    return min((size for size in (num_examples, available) if size is not None), default=None)


@contextmanager
def _scoring(model: nn.Module, targets: Iterable[nn.Parameter], training: bool) -> Iterator[None]:
    """Let gradients flow to the targets alone, in the base model, and put everything back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (collators use it)
    with ExitStack() as stack:
        for layer in child_tuning_layers(model).values():
            stack.enter_context(layer.base_only())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            model.train(training)
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False).grad = None
            for parameter in targets:
                parameter.requires_grad_(True)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, required, gradient in parameters:
                parameter.requires_grad_(required).grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
