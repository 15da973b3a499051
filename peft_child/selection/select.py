"""Task-driven choice of an adapter's child network: a Fisher pass over the task's data, then the largest scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peft_child.layers.granularity import INPUT_CHANNEL
from peft_child.layers.layer import ChildTuningLayer, child_tuning_layers
from peft_child.selection.fisher_pass import FisherPass
from peft_child.selection.loss import OVER_BATCHES, Forward
from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.delta import SparseDelta, fresh_delta
from peft_child.tensors.distributed import (
    check_equal,
    check_has_values,
    digest,
    gathered,
    is_sharded,
    on_every_rank,
    own_part,
    whole,
    world_size,
)
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.partitioned import gathered_whole, is_in_engine, numel_of, shape_of
from peft_child.tensors.quantised import dense
from peft_child.tensors.sharded_topk import select_largest_of_shards
from peft_child.tensors.topk import select_largest
from peft_child.tuner.config import ChildTuningConfig


Scores = Mapping[str, Tensor]


class ChildNetwork(NamedTuple):
    """What was chosen.

    Attributes:
        chosen: Entries in the child network.
        targeted: Entries from which it was chosen.
        dense: Entries of parameters that are trained whole, not counted in the density (`modules_to_save`).
        skipped: Examples that were left out of the Fisher information, since all their labels are -100.
    """

    chosen: int
    targeted: int
    dense: int
    skipped: int = 0

    def __str__(self) -> str:
        """One line for people."""
        share = self.chosen / self.targeted
        head = f"; {self.dense:,} other entries are trained densely" if self.dense else ""
        left_out = f"; {self.skipped:,} examples without labels were left out" if self.skipped else ""
        return f"child network: {self.chosen:,} of {self.targeted:,} targeted entries ({share:.2%}){head}{left_out}"


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
    score_device: torch.device | str | None = None,
    score_folder: str | Path | None = None,
) -> ChildNetwork:
    """Choose the child network of a task-driven adapter (Child-Tuning_D; Xu et al., 2021).

    Exactly `round(density * n)` of the n targeted entries are chosen, those with the largest scores over all targeted
    parameters together. With `granularity="input_channel"` whole channels are chosen, those with the largest mean
    score of an entry first, until the next would exceed that number. Call it once, before the optimizer is made, since
    it creates the parameters to be trained.

    In several processes (torch.distributed) every rank calls it with its own shard of the data, before the model is
    wrapped in DDP; see `estimate_fisher`. All end with the same child network, which is checked. In a model that is
    sharded already (FSDP2) the scores of entries stay in shards; to train what was chosen there, save the adapter, and
    load that before sharding.

    Args:
        model: A model with a Child-Tuning adapter: a `PeftModel`, or a transformers model after `add_adapter`.
        dataloader: The task's data, with labels; see `estimate_fisher`, which also takes the other arguments.
        scores: Ready-made scores instead of data: a mapping as `estimate_fisher` returns it, or the path of a
            safetensors file that holds one; the same on every rank.
        adapter_name: The adapter; it must be active.
        num_examples: Number of examples to use, the first ones, of all ranks together; by default all.
        forward_fn: See `estimate_fisher`.
        loss_fn: See `estimate_fisher`.
        split_batches: See `estimate_fisher`.
        progress_bar: See `estimate_fisher`.
        score_device: See `estimate_fisher`.
        score_folder: See `estimate_fisher`.

    Returns:
        The sizes of what was chosen; printing it gives one line.

    Raises:
        ValueError: If neither or both of data and scores are given, or they are not as described, or no score is
            positive, or the density is too small for one channel, or the adapter is not a task-driven one; or if ranks
            differ in their settings or scores.
        RuntimeError: If the adapter's child network has been trained already.
    """
    # What may fail on one rank runs in on_every_rank, since the other ranks would wait for it for ever.
    found = on_every_rank(partial(_ready_scores, dataloader, scores))
    config, layers, targets, layouts = on_every_rank(partial(_selectable, model, adapter_name))
    source = "ready scores" if dataloader is None else "data"
    _check_same_settings(model, config, targets, {"source": source, "num_examples": num_examples})
    examples, skipped = None, 0
    if dataloader is not None:
        settings = num_examples, forward_fn, loss_fn, split_batches, progress_bar, score_device, score_folder
        fisher_pass = FisherPass(model, config.fisher, layouts, *settings)
        found = fisher_pass.scores(dataloader, targets)
        examples, skipped = fisher_pass.examples, fisher_pass.skipped
    on_every_rank(partial(_check_scores, found, targets, layouts))
    targeted = sum(map(numel_of, targets.values()))
    chosen = _choose(found, targets, layouts, config.child_size(targeted))
    if len(set(gathered(digest(chosen)))) > 1:
        raise ValueError("Every process must have the same scores; these would choose different child networks.")

    def child(name: str) -> SparseDelta:
        positions = layouts[name].positions(chosen[name]) if layouts else chosen[name]
        return fresh_delta(targets[name], positions, config.init_weights, layouts.get(name))

    configs = cast(dict[str, ChildTuningConfig], model.peft_config)
    # A copy, since the user may have made other models with this configuration.
    configs[adapter_name] = replace(config, fisher_examples=examples)
    children = Lazy(targets, child)  # made one at a time, when their layers ask
    for layer in layers:
        layer.set_child(adapter_name, children, trainable=not config.inference_mode)
    others = sum(numel_of(parameter) for _, parameter in _dense_parameters(model))
    size = sum(len(own) * (layouts[name].size if layouts else 1) for name, own in chosen.items())
    return ChildNetwork(size, targeted, others, skipped)


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
    score_device: torch.device | str | None = None,
    score_folder: str | Path | None = None,
) -> dict[str, Tensor]:
    """Estimate the Fisher information of the parameters that an adapter targets, at the base model's weights.

    With `fisher="per_example"` the score of an entry is the mean over examples of the squared gradient of that
    example's loss, at its true label, without dropout, so that neither the batch size nor the order matters. Where the
    loss of an example is a mean over its tokens, as in causal language models, every sequence counts alike, whatever
    its length; a `loss_fn` that sums weighs it by its tokens.

    The examples of a batch are scored in one forward and one backward pass, if that gives the same: two of them are
    scored alone first, to find out how the loss of a batch weighs its examples (a mean over examples or tokens, or a
    sum). If they influence each other (batch normalisation in training mode, a loss over the whole batch), or most
    targeted weights are in modules of other kinds than linear, convolution and embedding layers, every example takes
    a forward and a backward pass of its own, and a warning in the log says why. Memory grows with the batch size of
    the dataloader, as in training without gradients of weights; batches of one example take least.

    With `fisher="authors"` the score is the mean over the dataloader's batches of the squared gradient of the batch
    loss, with dropout, and with each parameter's gradient clipped to norm 1.

    The model, its modes, gradients and buffers, and the states of the random number generators are restored at the
    end. Other adapters are switched off meanwhile; the dense head (`modules_to_save`) is used, but not scored.

    In several processes (torch.distributed) every rank scores its own shard, as `DistributedSampler` or accelerate
    divide the data, and all return the mean over the examples of all shards, whatever their sizes. Samplers that
    repeat examples to make the shards equal give those double weight. The model must not be wrapped in DDP yet. An
    error on one rank is raised on every rank.

    A model that is sharded (FSDP2) averages the gradients of all ranks. So its ranks send each other their examples,
    and score all of them together, which takes as long as in one process.

    Input channels are scored without the gradient of their weights, so these may be quantised, too: only the inputs
    of their modules and the gradients of the outputs are needed. Weights of other modules than linear, embedding and
    norm layers, and those that the model uses without calling their modules, take gradients as usual.

    Args:
        model: A model with a Child-Tuning adapter.
        dataloader: Batches with labels: mappings of tensors that the model takes as keyword arguments, the first
            dimension of each being the example; or anything that `forward_fn` understands, built of mappings, tuples
            and lists.
        adapter_name: The adapter; it must be active.
        num_examples: Number of examples to use, the first ones; by default all. Where batches are not taken apart, the
            last one is used whole. With several processes it is the total: each takes its share, or all it has.
        forward_fn: `forward_fn(model, batch)` in place of `model(**batch)`; returns the model's output, or the loss.
            It is called with single examples (as batches of one) as well as with whole batches.
        loss_fn: `loss_fn(output, batch)` in place of `output.loss`; returns a scalar.
        split_batches: Take batches apart into single examples. Pass False if each batch counts as one example, such
            as a graph, or packed sequences.
        progress_bar: Show a progress bar, on the first rank, in a terminal or a notebook; a log file gets none.
        score_device: Where to add up the scores, such as 'cpu' while the model is on a GPU; by default on the device
            of each parameter. They take 4 bytes for each targeted weight.
        score_folder: For scores that do not fit into memory: a folder to add them up in, in memory-mapped files (raw
            float32, one for each parameter). The files are not deleted afterwards.

    Returns:
        Scores by name of the parameter in the base model, float32: in the shape of the parameter, or, for input
        channels, the sum over the entries of each, shape `(number of channels,)`. They can be kept with
        `safetensors.torch.save_file`. Scores of a sharded parameter are sharded as it is (DTensors).

    Raises:
        ValueError: If there are no examples, or none on one rank; an example has no loss or one that is not finite;
            tensors of a batch disagree about its size; or ranks differ in their settings.
    """
    config, _, targets, layouts = on_every_rank(partial(adapter_of, model, adapter_name))
    _check_same_settings(model, config, targets, {"num_examples": num_examples})
    settings = num_examples, forward_fn, loss_fn, split_batches, progress_bar, score_device, score_folder
    return FisherPass(model, config.fisher, layouts, *settings).scores(dataloader, targets)


def weight_magnitudes(model: nn.Module, *, adapter_name: str = "default") -> dict[str, Tensor]:
    """The magnitudes of the weights that an adapter targets, to choose the largest of them without any data.

    Args:
        model: The model, with a task-driven adapter.
        adapter_name: The adapter.

    Returns:
        Scores for `select_child_network`, by name of the parameter in the base model, float32: absolute values in the
        shape of the parameter; or, for input channels, the sum of the squares of a channel, shape `(channels,)`, so
        that the channels with the largest mean square are chosen. Quantised weights are unpacked, one at a time. Of a
        sharded parameter the absolute values are sharded as it is (DTensors).

    Raises:
        ValueError: If there is no such Child-Tuning adapter, it is not active, an adapter is merged, or the model is
            wrapped in DDP.
        RuntimeError: If a targeted parameter is offloaded.
    """
    _, _, targets, layouts = on_every_rank(partial(adapter_of, model, adapter_name))
    if layouts:
        return {name: layouts[name].sums(whole(_values(base)).square()) for name, base in targets.items()}
    return {name: _values(base).abs() for name, base in targets.items()}


def _values(parameter: nn.Parameter) -> Tensor:
    return dense(parameter.detach()).float()


class Adapter(NamedTuple):
    """What a choice of entries needs of an adapter.

    Attributes:
        targets: Its targeted parameters by name.
        layouts: How input channels lie in them, by name; empty if single entries are chosen.
    """

    config: ChildTuningConfig
    layers: list[ChildTuningLayer]
    targets: dict[str, nn.Parameter]
    layouts: dict[str, ChannelLayout]


def adapter_of(model: nn.Module, adapter_name: str) -> Adapter:
    """Find an adapter by its name.

    Raises:
        ValueError: If there is no such Child-Tuning adapter, it is not active, an adapter is merged, or the model is
            wrapped in DDP.
        RuntimeError: If a targeted parameter is offloaded.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "The child network must be chosen before the model is wrapped in DistributedDataParallel, which does not "
            "see parameters that are made later."
        )
    if is_in_engine(model):
        raise ValueError(
            "The child network must be chosen before DeepSpeed takes the model over (deepspeed.initialize, "
            "accelerator.prepare, trainer.train), whose optimizer does not see parameters that are made later. To "
            "make a trained one smaller, save it, and load it in one process."
        )
    configs = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    if not isinstance(config, ChildTuningConfig):
        raise ValueError(f"The model has no Child-Tuning adapter named '{adapter_name}'; see get_peft_model.")
    layers = list(child_tuning_layers(model, adapter_name).values())
    if any(adapter_name not in layer.active_adapters for layer in layers):
        active = ", ".join(layers[0].active_adapters) or "none"
        raise ValueError(
            f"Adapter '{adapter_name}' is not active ({active} is): pass adapter_name= for another one, or call "
            f"model.set_adapter('{adapter_name}') first."
        )
    merged = [name for layer in child_tuning_layers(model).values() for name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter '{merged[0]}' is merged into the base model; call model.unmerge_adapter() first.")
    layouts = {}
    if config.granularity == INPUT_CHANNEL:
        layouts = {name: layout for layer in layers for name, layout in layer.layouts(adapter_name).items()}
    targets = {name: base for layer in layers for name, base in layer.base_parameters(adapter_name).items()}
    for name, parameter in targets.items():
        check_has_values(f"'{name}'", parameter)
    return Adapter(config, layers, targets, layouts)


def _selectable(model: nn.Module, adapter_name: str) -> Adapter:
    """Find an adapter whose child network can be selected now; errors are those of `select_child_network`."""
    adapter = adapter_of(model, adapter_name)
    if adapter.config.variant != "task_driven":
        hint = ", and has to be loaded from a file" if adapter.config.variant == "extracted" else ""
        raise ValueError(
            f"Only a task_driven child network is selected; '{adapter_name}' is {adapter.config.variant}{hint}."
        )
    if any(layer.is_trained(adapter_name) for layer in adapter.layers):
        raise RuntimeError(
            f"The child network of adapter '{adapter_name}' has been trained already; choosing another one would lose "
            "it. Save it, and add a new adapter."
        )
    # This raises if the density chooses nothing; better now than after the pass over the data.
    adapter.config.child_size(sum(map(numel_of, adapter.targets.values())))
    return adapter


def _check_same_settings(
    model: nn.Module, config: ChildTuningConfig, targets: Mapping[str, nn.Parameter], others: Mapping[str, object]
) -> None:
    """Raise if ranks differ in a setting that determines the child network, which would go unnoticed."""
    if world_size() == 1:
        return
    shapes = repr({name: tuple(shape_of(parameter)) for name, parameter in targets.items()})
    trained_whole = {name: parameter for name, parameter in _dense_parameters(model) if not is_sharded(parameter)}
    with gathered_whole(trained_whole.values()):
        of_dense = digest(trained_whole)[:12]
    check_equal(
        {
            "density": config.density,
            "fisher": config.fisher,
            "granularity": config.granularity,
            **others,
            "number of targeted parameters": len(targets),
            "digest of the targeted parameters' names and shapes": hashlib.sha256(shapes.encode()).hexdigest()[:12],
            "digest of the densely trained weights (set the same seed before a new head is made)": of_dense,
        }
    )


def _dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained densely: all that require gradients, but for the deltas of child networks."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".child_delta." not in name:
            yield name, parameter


def _ready_scores(dataloader: Iterable[Any] | None, scores: Scores | str | Path | None) -> Scores:
    """The scores that were passed in place of data; none if there is a dataloader."""
    if (dataloader is None) == (scores is None):
        raise ValueError("select_child_network needs either a dataloader or scores, got both or neither.")
    return load_file(scores) if isinstance(scores, (str, Path)) else scores or {}


def _choose(
    scores: Scores, targets: Mapping[str, nn.Parameter], layouts: Mapping[str, ChannelLayout], size: int
) -> dict[str, Tensor]:
    """The child network by name: flat indices, or numbers of channels."""
    ordered = {name: scores[name] for name in targets}  # the order decides ties
    if layouts:
        chosen = on_every_rank(partial(choose_channels, ordered, layouts, size))
    elif any(is_sharded(score) for score in ordered.values()):
        chosen = select_largest_of_shards(ordered, size)
    else:
        chosen = on_every_rank(partial(select_largest, ordered, size))
    if not any(gathered(any(bool(own_part(score).any()) for score in ordered.values()))):
        raise ValueError(f"No score is positive: the loss does not depend on any targeted weight. {OVER_BATCHES}")
    return chosen


def _check_scores(scores: Scores, targets: Mapping[str, nn.Parameter], layouts: Mapping[str, ChannelLayout]) -> None:
    missing, extra = targets.keys() - scores.keys(), scores.keys() - targets.keys()
    for kind, names in (("are missing", missing), ("are extra", extra)):
        if names:
            some = ", ".join(f"'{name}'" for name in sorted(names)[:3])
            raise ValueError(
                f"scores must have exactly one tensor for each targeted parameter; {len(names)} {kind}: {some}."
            )
    for name, parameter in targets.items():
        shape = (layouts[name].number,) if layouts else tuple(shape_of(parameter))
        if tuple(scores[name].shape) != shape:
            kind = "be one for each input channel" if layouts else "have the shapes of their parameters"
            raise ValueError(
                f"Scores must {kind}; those of '{name}' have the shape {tuple(scores[name].shape)}, and need {shape}."
            )
