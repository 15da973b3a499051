"""The Fisher pass: a model's loss on every example of the task's data, and the model put back as it was."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_child.batches import batch_size, single_examples, to_device
from peft_child.fisher import diagonal_fisher, zeros_beside
from peft_child.layer import child_tuning_layers
from peft_child.quantised import is_quantised
from peft_child.ranks import check_can_add, gathered, in_step, is_sharded, rank, world_size


Forward = Callable[[Any, Any], Any]


@dataclass
class FisherPass:
    """One pass over the data; see `estimate_fisher` for the arguments.

    Attributes:
        by_batch: Score batches as they come, with dropout and clipping, as the authors' code does.
        examples: Number of examples that were scored; in the end those of all processes together.
    """

    model: nn.Module
    dataloader: Iterable[Any]
    by_batch: bool
    num_examples: int | None = None
    forward_fn: Forward | None = None
    loss_fn: Forward | None = None
    split_batches: bool = True
    progress_bar: bool = True
    score_device: torch.device | str | None = None
    score_folder: str | Path | None = None
    examples: int = 0

    def scores(self, targets: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Fisher information of the targets, float32, in their shapes."""
        if self.num_examples is not None and self.num_examples < world_size():
            raise ValueError(
                f"num_examples must be None or at least the number of processes, {world_size()}; "
                f"got {self.num_examples}."
            )
        for name, parameter in targets.items():
            if is_quantised(parameter):
                raise ValueError(
                    f"'{name}' is quantised ({type(parameter).__name__}), and no gradient reaches it: estimate the "
                    "Fisher information in the base model as it was before, and pass it as scores=."
                )
        device = next(iter(targets.values())).device
        shared = any(is_sharded(parameter) for parameter in targets.values())
        if shared and not (self.score_device is self.score_folder is None):
            raise ValueError(
                "Scores of a sharded model stay with its shards; leave out score_device and score_folder."
            )
        if not shared:
            check_can_add(torch.device("cpu" if self.score_folder else self.score_device or device))
        max_norm = 1.0 if self.by_batch else None
        with _scoring(self.model, targets.values(), training=self.by_batch):
            if shared:  # dropout must be the same on every rank, as the example is
                torch.manual_seed(gathered(torch.initial_seed())[0])
            found = diagonal_fisher(targets, self._losses(device, shared), max_norm, shared, self._make_room)
        if not shared:
            self.examples = sum(gathered(self.examples))
        return found

    def _make_room(self, name: str, parameter: Tensor) -> Tensor:
        if self.score_folder is not None:
            return _mapped_zeros(Path(self.score_folder), name, parameter.shape)
        if self.score_device is not None:
            return torch.zeros(parameter.shape, device=self.score_device)
        return zeros_beside(name, parameter)

    def _losses(self, device: torch.device, shared: bool) -> Iterator[Tensor]:
        scored = [0] * world_size()  # examples of each rank

        def has_enough(rank: int) -> bool:
            return self.num_examples is not None and scored[rank] >= _share(self.num_examples, rank)

        mine = None if self.num_examples is None else _share(self.num_examples, rank())
        total = _total(self.dataloader, mine) if self.split_batches else None
        silent = not self.progress_bar or rank() > 0
        with tqdm(desc="Fisher information", unit=" examples", total=total, disable=silent) as bar:
            for source, batch in in_step(self._batches(), has_enough, shared):
                for example, size in self._examples(batch):
                    if has_enough(source):
                        break
                    yield self._loss(to_device(example, device))
                    scored[source] += size
                    self.examples += size
                    bar.update(size)

    def _batches(self) -> Iterator[Any]:
        is_empty = True
        for batch in self.dataloader:
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError("The Fisher information needs at least one example, got none.")

    def _examples(self, batch: Any) -> Iterator[tuple[Any, int]]:
        if not self.split_batches:
            yield batch, 1
        elif self.by_batch:
            yield batch, batch_size(batch)
        else:
            yield from ((example, 1) for example in single_examples(batch))

    def _loss(self, example: Any) -> Tensor:
        if self.forward_fn is not None:
            output = self.forward_fn(self.model, example)
        elif isinstance(example, Mapping):
            output = self.model(**example)
        else:
            raise ValueError(
                f"Batches must be mappings, got a {type(example).__name__}; pass a forward_fn for others."
            )
        loss = self.loss_fn(output, example) if self.loss_fn is not None else _loss_of(output)
        if loss is None:
            keys = f" (they have {', '.join(map(str, example))})" if isinstance(example, Mapping) else ""
            raise ValueError(
                f"The model returned no loss for example {self.examples}: batches need labels{keys}, or a loss_fn."
            )
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"The loss of every example must be finite; that of example {self.examples} is {value}.")
        if not loss.requires_grad:
            raise ValueError(f"The loss of example {self.examples} does not depend on any targeted weight.")
        return loss


def _loss_of(output: Any) -> Tensor | None:
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
