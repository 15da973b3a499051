"""Task-driven choice of an adapter's child network: a Fisher pass over the task's data, then the largest scores."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_child.batches import batch_size, single_examples, to_device
from peft_child.config import ChildTuningConfig
from peft_child.fisher import diagonal_fisher
from peft_child.layer import ChildTuningLayer, child_tuning_layers
from peft_child.selection import select_largest


Forward = Callable[[Any, Any], Any]
Scores = Mapping[str, Tensor]


class ChildNetwork(NamedTuple):
    """What was chosen.

    Attributes:
        chosen: Entries in the child network.
        targeted: Entries it was chosen from.
        dense: Entries trained besides, outside the density (`modules_to_save`).
    """

    chosen: int
    targeted: int
    dense: int

    def __str__(self) -> str:
        """One line for people."""
        share = self.chosen / self.targeted
        head = f"; {self.dense:,} entries besides are trained densely" if self.dense else ""
        return f"child network: {self.chosen:,} of {self.targeted:,} targeted entries ({share:.2%}){head}"


def select_child_network(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    scores: Scores | str | Path | None = None,
    adapter_name: str = "default",
    num_examples: int | None = None,
    forward_fn: Forward | None = None,
    loss_fn: Forward | None = None,
    progress_bar: bool = True,
) -> ChildNetwork:
    """Choose the child network of a task-driven adapter (Child-Tuning_D; Xu et al., 2021).

    Exactly `round(density * n)` of the n targeted entries are chosen, those with the largest scores over all targeted
    parameters together. Call it once, before the optimizer is made, since it creates the parameters to be trained.

    Args:
        model: A model with a Child-Tuning adapter: a `PeftModel`, or a transformers model after `add_adapter`.
        dataloader: The task's data, with labels; see `estimate_fisher`, which also takes the other arguments.
        scores: Ready-made scores instead of data: a mapping as `estimate_fisher` returns it, or the path of a
            safetensors file of one.
        adapter_name: The adapter; it must be active.
        num_examples: Use the first so many examples of the data; by default all.
        forward_fn: See `estimate_fisher`.
        loss_fn: See `estimate_fisher`.
        progress_bar: Show a progress bar.

    Returns:
        The sizes of what was chosen; printing it gives one line.

    Raises:
        ValueError: If neither or both of data and scores are given, or they are not as described, or the adapter is
            not a task-driven one or merged.
        RuntimeError: If the adapter's child network has been trained already.
    """
    if (dataloader is None) == (scores is None):
        raise ValueError("select_child_network needs either a dataloader or scores, got both or neither.")
    config, layers = _adapter(model, adapter_name)
    if config.variant != "task_driven":
        raise ValueError(f"Only a task_driven child network is selected; '{adapter_name}' is {config.variant}.")
    _check_untrained(adapter_name, layers)
    targets = _targets(layers, adapter_name)
    size = config.child_size(sum(parameter.numel() for parameter in targets.values()))

    if dataloader is not None:
        found, config.fisher_examples = _score(
            model, config, layers, targets, dataloader, num_examples, forward_fn, loss_fn, progress_bar
        )
    else:
        found = load_file(scores) if isinstance(scores, (str, Path)) else dict(scores or {})
        _check_scores(found, targets)
        config.fisher_examples = None
    chosen = select_largest({name: found[name] for name in targets}, size)

    config.child_sizes = {}
    for layer in layers:
        indices = {key: chosen[name] for key, name in layer.child_targets[adapter_name].items()}
        trainable = not config.inference_mode
        config.child_sizes |= layer.set_child(adapter_name, indices, config.init_weights, trainable)
    targeted = sum(parameter.numel() for parameter in targets.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ChildNetwork(size, targeted, trained - size if not config.inference_mode else 0)


def estimate_fisher(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str = "default",
    num_examples: int | None = None,
    forward_fn: Forward | None = None,
    loss_fn: Forward | None = None,
    progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Estimate the Fisher information of the parameters that an adapter targets, at the base model's weights.

    With `fisher="per_example"` the score of an entry is the mean over examples of the squared gradient of that
    example's loss, at its true label, without dropout. Batches are taken apart into single examples, so that neither
    the batch size nor the order matters. Where the loss of an example is a mean over its tokens, as in causal language
    models, every sequence counts alike, whatever its length; a `loss_fn` that sums weighs it by its tokens.
    With `fisher="authors"` it is the mean over batches, as the dataloader makes them, of the squared gradient of the
    batch loss, with dropout, and with each parameter's gradient clipped to norm 1.

    The model, its modes, gradients and buffers and the states of the random number generators come back as they were.
    Other adapters are switched off meanwhile; the dense head (`modules_to_save`) takes part, without being scored.

    Args:
        model: A model with a Child-Tuning adapter.
        dataloader: Batches with labels: mappings of tensors that the model takes as keyword arguments, the first
            dimension of each being the example; or anything that `forward_fn` understands, built of mappings, tuples
            and lists.
        adapter_name: The adapter; it must be active.
        num_examples: Use the first so many examples; by default all.
        forward_fn: `forward_fn(model, batch)` in place of `model(**batch)`; returns the model's output, or the loss.
        loss_fn: `loss_fn(output, batch)` in place of `output.loss`; returns a scalar.
        progress_bar: Show a progress bar.

    Returns:
        Scores by name of the parameter in the base model, float32, in the shape and on the device of the parameter.
        They can be kept with `safetensors.torch.save_file`.

    Raises:
        ValueError: If there are no examples, an example has no loss or one that is not finite, or tensors of a batch
            disagree about its size.
    """
    config, layers = _adapter(model, adapter_name)
    targets = _targets(layers, adapter_name)
    arguments = (model, config, layers, targets, dataloader, num_examples, forward_fn, loss_fn, progress_bar)
    return _score(*arguments)[0]


def _score(
    model: nn.Module,
    config: ChildTuningConfig,
    layers: list[ChildTuningLayer],
    targets: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    num_examples: int | None,
    forward_fn: Forward | None,
    loss_fn: Forward | None,
    progress_bar: bool,
) -> tuple[dict[str, Tensor], int]:
    """The scores, and the number of examples that they come from."""
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples must be positive or None, got {num_examples}.")
    by_batch = config.fisher == "authors"
    device = next(iter(targets.values())).device
    seen = 0

    def losses() -> Iterator[Tensor]:
        nonlocal seen
        bar = tqdm(
            desc="Fisher information", unit="example", total=_total(dataloader, num_examples), disable=not progress_bar
        )
        with bar:
            for batch in dataloader:
                for example, size in [(batch, batch_size(batch))] if by_batch else single_examples(batch):
                    if num_examples is not None and seen >= num_examples:
                        return
                    yield _loss(model, to_device(example, device), forward_fn, loss_fn, seen)
                    seen += size
                    bar.update(size)

    with _scoring(model, layers, targets.values(), training=by_batch):
        scores = diagonal_fisher(targets, losses(), max_norm=1.0 if by_batch else None)
    return scores, seen


def _loss(
    model: nn.Module, example: Any, forward_fn: Forward | None, loss_fn: Forward | None, position: int
) -> Tensor:
    if forward_fn is not None:
        output = forward_fn(model, example)
    elif isinstance(example, Mapping):
        output = model(**example)
    else:
        raise ValueError(f"Batches must be mappings, got a {type(example).__name__}; pass a forward_fn for others.")
    if loss_fn is not None:
        loss = loss_fn(output, example)
    else:
        loss = output if isinstance(output, Tensor) and not output.dim() else getattr(output, "loss", None)
    if loss is None:
        keys = f" (they have {', '.join(map(str, example))})" if isinstance(example, Mapping) else ""
        raise ValueError(
            f"The model returned no loss for example {position}: batches need labels{keys}, or a loss_fn."
        )
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"The loss of every example must be finite; that of example {position} is {value}.")
    scalar: Tensor = loss
    return scalar


def _total(dataloader: Iterable[Any], num_examples: int | None) -> int | None:
    dataset = getattr(dataloader, "dataset", None)
    available = len(dataset) if isinstance(dataset, Sized) else None
    return min((size for size in (num_examples, available) if size is not None), default=None)


# The model around a Fisher pass


@contextmanager
def _scoring(
    model: nn.Module, layers: list[ChildTuningLayer], targets: Iterable[nn.Parameter], training: bool
) -> Iterator[None]:
    """Let gradients flow to the targets alone, in the base model, and put everything back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    disabled = [layer.disable_adapters for layer in layers]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (collators use it)
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        try:
            model.train(training)
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False).grad = None
            for parameter in targets:
                parameter.requires_grad_(True)
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was_disabled in zip(layers, disabled, strict=True):
                layer._disable_adapters = was_disabled
            for module, mode in modes:
                module.training = mode
            for parameter, required, gradient in parameters:
                parameter.requires_grad_(required).grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


# The adapter


def _adapter(model: nn.Module, adapter_name: str) -> tuple[ChildTuningConfig, list[ChildTuningLayer]]:
    configs = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    if not isinstance(config, ChildTuningConfig):
        raise ValueError(f"The model has no Child-Tuning adapter named '{adapter_name}'; see get_peft_model.")
    layers = [layer for layer in child_tuning_layers(model).values() if adapter_name in layer.child_targets]
    if any(adapter_name not in layer.active_adapters for layer in layers):
        raise ValueError(f"Adapter '{adapter_name}' is not active; call model.set_adapter('{adapter_name}') first.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter '{adapter_name}' is merged; call model.unmerge_adapter() first.")
    return config, layers


def _targets(layers: list[ChildTuningLayer], adapter_name: str) -> dict[str, nn.Parameter]:
    targets = {
        name: layer.base_parameter(key) for layer in layers for key, name in layer.child_targets[adapter_name].items()
    }
    for name, parameter in targets.items():
        if parameter.is_meta:
            raise RuntimeError(f"'{name}' is offloaded (on the meta device); load the base model without offloading.")
    return targets


def _check_untrained(adapter_name: str, layers: list[ChildTuningLayer]) -> None:
    if any(layer.is_trained(adapter_name) for layer in layers):
        raise RuntimeError(
            f"The child network of adapter '{adapter_name}' has been trained already; choosing another one would lose "
            "it. Save it, and add a new adapter."
        )


def _check_scores(scores: Scores, targets: Mapping[str, nn.Parameter]) -> None:
    for kind, names in (
        ("are missing", targets.keys() - scores.keys()),
        ("are extra", scores.keys() - targets.keys()),
    ):
        if names:
            some = ", ".join(f"'{name}'" for name in sorted(names)[:3])
            raise ValueError(
                f"scores must have exactly one tensor for each targeted parameter; {len(names)} {kind}: {some}."
            )
    for name, parameter in targets.items():
        if scores[name].shape != parameter.shape:
            raise ValueError(
                f"Scores must have the shapes of their parameters; those of '{name}' have {tuple(scores[name].shape)},"
                f" the parameter has {tuple(parameter.shape)}."
            )
