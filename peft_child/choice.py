"""Task-driven choice of an adapter's child network: a Fisher pass over the task's data, then the largest scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from peft_child.config import NO_MASK, ChildTuningConfig
from peft_child.delta import fresh_delta
from peft_child.layer import ChildTuningLayer, child_tuning_layers
from peft_child.scoring import FisherPass, Forward
from peft_child.selection import select_largest


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
    split_batches: bool = True,
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
        split_batches: See `estimate_fisher`.
        progress_bar: Show a progress bar.

    Returns:
        The sizes of what was chosen; printing it gives one line.

    Raises:
        ValueError: If neither or both of data and scores are given, or they are not as described, or no score is
            positive, or the adapter is not a task-driven one.
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

    examples = None
    if dataloader is not None:
        by_batch = config.fisher == "authors"
        fisher_pass = FisherPass(
            model, dataloader, by_batch, num_examples, forward_fn, loss_fn, split_batches, progress_bar
        )
        found = fisher_pass.scores(targets)
        examples = fisher_pass.examples
    else:
        found = load_file(scores) if isinstance(scores, (str, Path)) else dict(scores or {})
        _check_scores(found, targets)
    chosen = select_largest({name: found[name] for name in targets}, size)
    if not any(bool(score.any()) for score in found.values()):
        raise ValueError("No score is positive: the loss does not depend on any targeted weight.")

    configs = cast(dict[str, ChildTuningConfig], model.peft_config)
    configs[adapter_name] = replace(config, fisher_examples=examples)  # the user may have other models with this one
    for layer in layers:
        children = {
            key: fresh_delta(targets[name], chosen[name], config.init_weights)
            for key, name in layer.child_targets[adapter_name].items()
        }
        layer.set_child(adapter_name, children, trainable=not config.inference_mode)
    targeted = sum(parameter.numel() for parameter in targets.values())
    dense = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".child_delta." not in name
    )
    return ChildNetwork(size, targeted, dense)


def estimate_fisher(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str = "default",
    num_examples: int | None = None,
    forward_fn: Forward | None = None,
    loss_fn: Forward | None = None,
    split_batches: bool = True,
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
        num_examples: Use the first so many examples, in whole batches if those are not taken apart; by default all.
        forward_fn: `forward_fn(model, batch)` in place of `model(**batch)`; returns the model's output, or the loss.
        loss_fn: `loss_fn(output, batch)` in place of `output.loss`; returns a scalar.
        split_batches: Take batches apart into single examples. False if each batch is one example as it is, such as a
            graph, or packed sequences.
        progress_bar: Show a progress bar.

    Returns:
        Scores by name of the parameter in the base model, float32, in the shape and on the device of the parameter.
        They can be kept with `safetensors.torch.save_file`.

    Raises:
        ValueError: If there are no examples, an example has no loss or one that is not finite, or tensors of a batch
            disagree about its size.
    """
    config, layers = _adapter(model, adapter_name)
    by_batch = config.fisher == "authors"
    fisher_pass = FisherPass(
        model, dataloader, by_batch, num_examples, forward_fn, loss_fn, split_batches, progress_bar
    )
    return fisher_pass.scores(_targets(layers, adapter_name))


def _adapter(model: nn.Module, adapter_name: str) -> tuple[ChildTuningConfig, list[ChildTuningLayer]]:
    configs = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    if not isinstance(config, ChildTuningConfig):
        raise ValueError(f"The model has no Child-Tuning adapter named '{adapter_name}'; see get_peft_model.")
    layers = [layer for layer in child_tuning_layers(model).values() if adapter_name in layer.child_targets]
    if any(adapter_name not in layer.active_adapters for layer in layers):
        raise ValueError(f"Adapter '{adapter_name}' is not active; call model.set_adapter('{adapter_name}') first.")
    merged = [name for layer in child_tuning_layers(model).values() for name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter '{merged[0]}' is merged into the base model; call model.unmerge_adapter() first.")
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


class Kept(NamedTuple):
    """What `keep_largest` kept.

    Attributes:
        chosen: Entries in the child network.
        trained: Entries that were trained before.
        norm_share: L2 norm of the changes that were kept, over that of all.
        largest_dropped: Largest absolute change that was dropped; those entries are as in the base model again.
    """

    chosen: int
    trained: int
    norm_share: float
    largest_dropped: float

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"kept {self.chosen:,} of {self.trained:,} trained entries, {self.norm_share:.1%} of the norm of their "
            f"changes; the largest change dropped is {self.largest_dropped:.3g}"
        )


def keep_largest(model: nn.Module, density: float, *, adapter_name: str = "default") -> Kept:
    """Turn a trained adapter into a sparse one: keep its largest changes, and give the other entries back to the base.

    This makes a small file of a task-free adapter (Child-Tuning_F), whose change is dense after some steps. The model
    loses something; evaluate it before and after. The deltas are new parameters, so training on needs a new optimizer.

    Args:
        model: A model with a trained Child-Tuning adapter.
        density: Share of the targeted entries to keep, in (0, 1]; exactly `round(density * n)` of n.
        adapter_name: The adapter; it must be active.

    Returns:
        How much was kept; printing it gives one line.

    Raises:
        ValueError: If the density is out of range, or above that of the adapter.
    """
    config, layers = _adapter(model, adapter_name)
    for layer in layers:
        layer.check_is_chosen(adapter_name, "keeping its largest changes")
    changed = {name: delta for layer in layers for name, delta in layer.named_deltas(adapter_name).items()}
    kept = replace(config, variant="extracted", density=density, **NO_MASK, fisher_examples=None, child_sizes=None)
    size = kept.child_size(sum(parameter.numel() for parameter in _targets(layers, adapter_name).values()))
    trained = sum(delta.numel() for delta in changed.values())
    if size > trained:
        raise ValueError(f"density must be at most that of the adapter; {density} is {size} of {trained} entries.")
    chosen = select_largest({name: delta.abs().float() for name, delta in changed.items()}, size)

    squares = [0.0, 0.0]
    dropped = 0.0
    for name, delta in changed.items():
        rest = delta.index_fill(0, chosen[name], 0)
        dropped = max(dropped, float(rest.abs().max()))
        squares[0] += float(delta[chosen[name]].double().square().sum())
        squares[1] += float(delta.double().square().sum())
    for layer in layers:
        layer.keep(adapter_name, chosen)
    cast(dict[str, ChildTuningConfig], model.peft_config)[adapter_name] = kept
    return Kept(size, trained, (squares[0] / squares[1]) ** 0.5 if squares[1] else 1.0, dropped)
