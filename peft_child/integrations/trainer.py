"""A callback for transformers' Trainer: selects the child network, and logs how far it has moved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.linalg import vector_norm
from transformers import TrainerCallback

from peft_child.card.plot import grouped
from peft_child.layers.layer import child_tuning_layers
from peft_child.selection.select import Scores, select_child_network
from peft_child.tensors.distributed import check_equal, digest, whole, world_size
from peft_child.tensors.partitioned import gathered_whole
from peft_child.tuner.model import next_gradient_mask


if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class ChildTuningCallback(TrainerCallback):
    """Selects the child network when the Trainer is made, and logs how far it has moved while it trains.

    Training also works without this callback. Without data or scores the callback only logs, and a child network that
    is already selected or loaded is kept. The selection is made at the end of the Trainer's construction, before there
    is an optimizer; a Trainer with `model_init`, which makes a new model for each training, has to select in that
    function. Resuming from a checkpoint replaces the selection with the checkpoint's child network. In several
    processes the callback checks that all of them train the same child network.

    With every training loss it logs `child/moved`, the share of the chosen entries that differ from the base;
    `child/norm`, the L2 norm of the delta; and the norm by layer, as in `child/norm/layer.3`, with `child/norm/other`
    for parameters outside of numbered layers. These numbers are in the Trainer's `log_history` and reach all callbacks
    that run after this one. The reporters of `report_to` run before it; to have them log these numbers too, move them
    to the end, as in `trainer.add_callback(trainer.pop_callback(TensorBoardCallback))`.

    Args:
        dataloader: The task's data, as `select_child_network` takes it; in several processes each one's own shard.
        scores: Ready-made scores instead of data, as `select_child_network` takes them.
        adapter_name: The adapter.
        count_steps: Count optimizer steps for random gradient masks where torch's hooks do not, because the engine
            steps without a torch optimizer; see `next_gradient_mask`.
        kwargs: Further arguments of `select_child_network`, such as `num_examples`.
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | None = None,
        *,
        scores: Scores | str | Path | None = None,
        adapter_name: str = "default",
        count_steps: bool = False,
        **kwargs: Any,
    ) -> None:
        self.dataloader = dataloader
        self.scores = scores
        self.adapter_name = adapter_name
        self.count_steps = count_steps
        self.steps_before: list[int] = []
        self.kwargs = kwargs

    def on_init_end(self, *event: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Select the child network, if there are data or scores and it is not selected yet.

        Raises:
            ValueError: See `select_child_network`.
        """
        if model is None or (self.dataloader is None and self.scores is None):
            return
        layers = child_tuning_layers(model, self.adapter_name).values()
        # Without layers, selecting raises an error that names the missing adapter.
        if not layers or not all(layer.is_chosen(self.adapter_name) for layer in layers):
            select_child_network(
                model, self.dataloader, scores=self.scores, adapter_name=self.adapter_name, **self.kwargs
            )

    def on_train_begin(self, *event: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """In several processes, check that all of them train the same child network with the same gradient masks.

        Raises:
            ValueError: If they do not, such as random child networks of different seeds; raised on every rank.
        """
        if model is None or world_size() == 1:
            return
        for layer in child_tuning_layers(model).values():
            layer.clear_cache()  # broadcasts write without increasing the version counter that the cache relies on
        buffers, contents = dict(model.named_buffers()), {}
        for what, kind in (("child network", "child_index"), ("gradient masks", "child_mask")):
            held = {name: buffer for name, buffer in buffers.items() if f".{kind}.{self.adapter_name}." in name}
            contents[f"{what} of adapter '{self.adapter_name}' (digest)"] = digest(held)[:12]
        check_equal(contents)

    def on_step_begin(self, *event: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Remember the steps that were counted so far."""
        if self.count_steps and model is not None:
            self.steps_before = _counted_steps(model)

    def on_step_end(self, *event: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Count the step, unless torch's hooks did."""
        if self.count_steps and model is not None and _counted_steps(model) == self.steps_before:
            next_gradient_mask(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of the child network to the log of a training loss."""
        if model is None or logs is None or "loss" not in logs:
            return
        numbers = _numbers(model, self.adapter_name)
        logs.update(numbers)
        state.log_history[-1].update(numbers)  # the Trainer has put a copy of logs there


def _counted_steps(model: nn.Module) -> list[int]:
    return [step for layer in child_tuning_layers(model).values() for step in layer.counted_steps()]


def _numbers(model: nn.Module, adapter_name: str) -> dict[str, float]:
    """The numbers to log: how far the child network of an adapter has moved."""
    squares, moved, chosen = {}, 0.0, 0
    for layer in child_tuning_layers(model, adapter_name).values():
        with gathered_whole(layer.parameters_of(adapter_name).values()):
            for name, delta in layer.named_deltas(adapter_name).items():
                squares[name] = float(whole(vector_norm(delta, dtype=torch.float64))) ** 2
                moved += float(whole(delta.ne(0).sum()))
                chosen += delta.numel()
    if not squares:
        return {}
    norms = {
        "child/norm/other" if layer is None else f"child/norm/layer.{layer}": sum(group) ** 0.5
        for layer, group in grouped(squares, lambda place: place.layer).items()
    }
    return {"child/moved": moved / chosen, "child/norm": sum(squares.values()) ** 0.5, **norms}
