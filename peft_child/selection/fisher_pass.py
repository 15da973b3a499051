"""The Fisher pass: goes through the task's data, and puts the model back as it was."""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_child.layers.layer import child_tuning_layers
from peft_child.selection.batch_scorer import BatchScorer
from peft_child.selection.batches import batch_size, check_batch, labelled, some_examples, to_device
from peft_child.selection.loss import Forward, Loss
from peft_child.selection.loss_squares import LossSquares
from peft_child.selection.squares import average
from peft_child.tensors.channels import ChannelLayout
from peft_child.tensors.distributed import (
    check_can_add,
    gathered,
    in_step,
    is_sharded,
    on_every_rank,
    own_part,
    rank,
    world_size,
)
from peft_child.tensors.partitioned import gathered_whole
from peft_child.tensors.quantised import is_quantised


@dataclass
class FisherPass:
    """One pass over the data; the settings are those of `estimate_fisher`.

    Attributes:
        layouts: How input channels lie in the targets, by name; empty if single entries are scored.
        fisher: 'per_example', or 'authors' to score batches as they come, with dropout and clipping.
        examples: Number of examples that were scored, by this rank; by all ranks once `scores` has returned.
        skipped: Number of examples left out, counted in the same way. All their labels are -100, so that their mean
            loss would be 0 / 0.
    """

    model: nn.Module
    fisher: str
    layouts: Mapping[str, ChannelLayout]
    num_examples: int | None = None
    forward_fn: Forward | None = None
    loss_fn: Forward | None = None
    split_batches: bool = True
    progress_bar: bool = True
    score_device: torch.device | str | None = None
    score_folder: str | Path | None = None
    examples: int = 0
    skipped: int = 0

    @property
    def _by_batch(self) -> bool:
        return self.fisher == "authors"

    def scores(self, dataloader: Iterable[Any], targets: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Fisher information of the targets, float32: in their shapes, or summed over each input channel."""
        shared = any(is_sharded(parameter) for parameter in targets.values())  # then all ranks score all examples
        self._check(targets, shared)
        # A pass goes through the whole model for every example, so what ZeRO-3 has partitioned is gathered once.
        with gathered_whole(self.model.parameters()), _scoring(self.model, training=self._by_batch):
            if shared:  # all ranks run the same example, which needs the same dropout
                torch.manual_seed(gathered(torch.initial_seed())[0])
            on_every_rank(partial(self._check_memory, targets))
            sums = {name: self._zeros(name, parameter) for name, parameter in targets.items()}
            losses = on_every_rank(partial(self._add_squares, dataloader, targets, sums, shared))
            average(sums, losses, shared)
        if not shared:
            self.examples, self.skipped = map(sum, zip(*gathered((self.examples, self.skipped)), strict=True))
        if self.skipped and not rank():
            warnings.warn(
                f"{self.skipped} examples have no label but -100; the Fisher information is that of the "
                f"{self.examples} others.",
                stacklevel=3,
            )
        return sums

    def _check(self, targets: Mapping[str, nn.Parameter], shared: bool) -> None:
        """Refuse, before the pass, what cannot be scored or would get wrong scores."""
        if self.num_examples is not None and self.num_examples < world_size():
            raise ValueError(
                f"num_examples must be None or at least the number of processes, {world_size()}; "
                f"got {self.num_examples}."
            )
        if any(parameter.dtype == torch.float16 for parameter in targets.values()):
            warnings.warn(
                "Gradients of float16 weights below 6e-8 become zero, and so does their Fisher information: load the "
                "base model in bfloat16 or float32 for the choice, and keep the scores (estimate_fisher).",
                stacklevel=4,
            )
        if not shared:
            device = next(iter(targets.values())).device
            check_can_add(torch.device("cpu" if self.score_folder else self.score_device or device))
        elif not (self.score_device is self.score_folder is None):
            raise ValueError(
                "Scores of a sharded model stay with its shards; leave out score_device and score_folder."
            )

    def _check_memory(self, targets: Mapping[str, nn.Parameter]) -> None:
        """Refuse scores of single entries that would not fit, before the first of them is made."""
        if self.layouts or self.score_folder is not None:
            return
        needed: Counter[torch.device] = Counter()
        for parameter in targets.values():
            needed[torch.device(self.score_device or parameter.device)] += 4 * own_part(parameter).numel()
        for device, size in needed.items():
            free = _free_memory(device)
            if free is not None and size > free:
                raise ValueError(
                    f"The scores of single entries take 4 bytes for each targeted weight, {size / 1e9:.1f} GB on "
                    f"{device}, of which {free / 1e9:.1f} GB are free: use granularity='input_channel', whose scores "
                    "are small, or pass score_device='cpu' or score_folder=."
                )

    def _zeros(self, name: str, parameter: Tensor) -> Tensor:
        """Where to add up the scores of a parameter; by default on its device, and sharded as it is."""
        shape = torch.Size([self.layouts[name].number]) if self.layouts else parameter.shape
        if self.score_folder is not None:
            folder = Path(self.score_folder) / (f"rank{rank()}" if world_size() > 1 else "")
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{name}.float32"
            file.unlink(missing_ok=True)  # of an earlier pass: its values would be kept
            return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)
        if self.layouts or self.score_device is not None or is_quantised(parameter):
            return torch.zeros(shape, device=self.score_device or parameter.device)
        return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)

    def _add_squares(
        self, dataloader: Iterable[Any], targets: Mapping[str, nn.Parameter], sums: dict[str, Tensor], shared: bool
    ) -> int:
        """Add the squared gradients of this rank's data, in step with the others; returns the number of losses."""
        loss = Loss(self.model, self.forward_fn, self.loss_fn)
        of_batches = LossSquares(loss, targets, sums, self.layouts, 1.0 if self._by_batch else None)
        # Shards of gradients are those of all ranks; what input channels need is not sharded.
        at_once = bool(self.layouts) or not any(map(is_sharded, self.model.parameters()))
        of_examples = BatchScorer(loss, targets, sums, self.layouts, at_once)
        device = next(iter(targets.values())).device
        left = [_share(self.num_examples, number) for number in range(world_size())]  # to score of each rank's data
        losses = 0
        total = _total(dataloader, self.num_examples and left[rank()]) if self.split_batches else None
        hidden = None if self.progress_bar and rank() == 0 else True  # None: shown on a terminal or in a notebook
        if hidden is None and "ipykernel" in sys.modules:
            hidden = False  # a notebook is no terminal
        with tqdm(desc="Fisher information", unit=" examples", total=total, disable=hidden) as bar:
            for source, batch in in_step(self._batches(dataloader), lambda source: left[source] <= 0, shared):
                kept = self._without_unlabelled(batch) if left[source] > 0 else None
                if kept is None:
                    continue
                kept = to_device(kept, device)
                size = batch_size(kept) if self.split_batches else 1
                if self._by_batch or not self.split_batches:
                    of_batches.add(kept, self.examples)
                    losses += 1
                else:
                    available, size = size, min(size, left[source])
                    of_examples.add(some_examples(kept, range(size), available), size, self.examples)
                    losses += size
                left[source] -= size
                self.examples += size
                bar.update(size)
        return losses

    def _without_unlabelled(self, batch: Any) -> Any:
        """A batch without its examples that have no label; None if there are no others."""
        kept = labelled(batch)
        if kept is None or (kept and (self._by_batch or not self.split_batches)):  # such batches stay whole
            return batch
        size = len(batch["labels"]) if self.split_batches else 1
        self.skipped += size - len(kept)
        return some_examples(batch, kept, size) if kept else None

    def _batches(self, dataloader: Iterable[Any]) -> Iterator[Any]:
        is_empty = True
        for batch in dataloader:
            is_empty = False
            if self.forward_fn is None:
                check_batch(batch)
            yield batch
        if is_empty:
            raise ValueError("The Fisher information needs at least one example, got none.")


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if that is not known."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return None


def _share(num_examples: int | None, number: int) -> int:
    """How many examples the rank of this number scores; the first ranks score one more if the division leaves some."""
    if num_examples is None:
        return sys.maxsize
    each, left = divmod(num_examples, world_size())
    return each + (number < left)


def _total(dataloader: Iterable[Any], num_examples: int | None) -> int | None:
    """Number of examples for the progress bar; None if it is not known."""
    sizes = [] if num_examples is None else [num_examples]
    dataset = getattr(dataloader, "dataset", None)
    if isinstance(dataset, Sized) and world_size() == 1:  # with several ranks it may be that of all shards
        sizes.append(len(dataset))
    return min(sizes, default=None)


@contextmanager
def _scoring(model: nn.Module, training: bool) -> Iterator[None]:
    """Make the model the frozen base model, without adapters or gradients, and restore everything afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # Only training mode changes buffers, such as running means.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (collators use it)
    with ExitStack() as stack:
        for layer in child_tuning_layers(model).values():
            stack.enter_context(layer.base_only())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.inference_mode(False))  # the caller may be in inference mode
        stack.enter_context(torch.enable_grad())
        try:
            model.train(training)
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False).grad = None
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
