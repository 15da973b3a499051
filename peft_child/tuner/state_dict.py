"""Saving and loading: turns the layers of a model into the tensors of an adapter file, and back.

Loading checks everything before it changes anything: a file that is damaged, or that belongs to another base model,
leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from peft_child.files.adapter_tensors import (
    DELTA,
    INDEX,
    MASK,
    StoredChild,
    check_numel,
    fingerprint_of,
    fingerprints_differ,
    precise_dtype,
    read_children,
    stamped,
)
from peft_child.layers.granularity import INPUT_CHANNEL
from peft_child.layers.layer import ChildTuningLayer, child_tuning_layers
from peft_child.tensors.codec import FormatError, with_delta_checksum
from peft_child.tensors.delta import ChildSize
from peft_child.tensors.distributed import alike, check_all_come, check_equal, digest, whole
from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.partitioned import check_not_optimized, gathered_whole, is_partitioned, numel_of, shape_of
from peft_child.tensors.quantised import is_quantised
from peft_child.tuner.config import ChildTuningConfig


# Activation checkpointing and FSDP1 put these into module names, but not into the keys of state dicts.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_NEW = {"classifier", "score", "qa_outputs", "pooler"}  # parts that transformers makes where a checkpoint lacks them


def tensors_to_save(
    model: nn.Module, config: ChildTuningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter file, under names that still contain the adapter's.

    If the model is sharded over processes (FSDP2, ZeRO-3), every rank has to call this, and gets whole tensors: the
    child network and the modules saved whole are gathered, one tensor at a time, and nothing else. With a state dict
    that is whole already, as the Trainer passes it, nothing is gathered.

    Args:
        model: A model whose layers have the adapter.
        config: The adapter's configuration, which is saved next; sizes and labels are recorded in it.
        adapter_name: The adapter.
        state_dict: PEFT's copy of the model's state dict, without other adapters. It is changed in place, since PEFT
            takes more tensors from it afterwards: child networks and the base weights of all layers are removed, and
            `modules_to_save` are gathered if they are sharded.

    Raises:
        RuntimeError: If no child network was chosen, or the state dict does not hold all of it.
    """
    layers = _layers(model)
    _gather(model, adapter_name, state_dict)
    sizes: dict[str, ChildSize] = {}
    for layer in layers.values():
        if layer.has_adapter(adapter_name):
            layer.check_is_chosen(adapter_name, "saving")
            sizes |= layer.sizes(adapter_name)
    config.present_sizes = sizes
    config.record_labels(getattr(model, "config", None))
    prefixes = tuple(f"{name}.child_" for name in layers)  # indices, deltas and masks
    is_written = bool(state_dict)  # accelerate gives an empty one to the ranks that do not write
    selected = {key: whole(state_dict.pop(key)) for key in list(state_dict) if key.startswith(prefixes)}
    for name in sorted(layers, key=len, reverse=True):
        inside = f"{name}.base_layer."
        for parameter in layers[name].base_layer._parameters:
            state_dict.pop(f"{inside}{parameter}", None)
        if not layers[name].has_adapter(adapter_name):  # another adapter's layer: models that load will not have it
            selected = {
                f"{name}.{key.removeprefix(inside)}" if key.startswith(inside) else key: value
                for key, value in selected.items()
            }
    if is_written:
        _check_saved(sizes, selected)
    dense = [key for key in state_dict if f".modules_to_save.{adapter_name}." in key]
    state_dict |= {key: whole(state_dict[key]) for key in dense}
    return stamped(selected, getattr(torch, config.delta_dtype))


def _gather(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Put what is trained into a state dict that has placeholders, since ZeRO-3 has partitioned the parameters."""
    kinds = (f".{DELTA}.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    absent = {}
    for name, parameter in model.named_parameters():
        key = _without_wrappers(name)
        is_placeholder = key in state_dict and state_dict[key].numel() != numel_of(parameter)
        if is_partitioned(parameter) and is_placeholder and any(kind in key for kind in kinds):
            absent[key] = parameter
    if absent:
        check_all_come(
            "Not every rank gathers the child network, which ZeRO-3 has partitioned: call save_pretrained on every "
            "rank without state_dict=, or, with the state dict that accelerator.get_state_dict returns, on the main "
            "process alone."
        )
    for key, parameter in absent.items():
        with gathered_whole([parameter]):
            state_dict[key] = parameter.detach().clone()


def _check_saved(sizes: Mapping[str, ChildSize], selected: Mapping[str, Tensor]) -> None:
    entries = sum(value.numel() for key, value in selected.items() if f".{DELTA}." in key)
    blocks = sum(f".{INDEX}." in key for key in selected)
    expected = sum(size.chosen for size in sizes.values())
    if (entries, blocks) != (expected, len(sizes)):
        raise RuntimeError(
            f"The state dict holds {entries} entries and {blocks} index blocks of child networks, the layers here "
            f"have {expected} and {len(sizes)}. Pass the state dict of the whole model; to save sharded models, use "
            "FSDP2 (fully_shard), not FSDP1."
        )


def _layers(model: nn.Module) -> dict[str, ChildTuningLayer]:
    """The layers of a model by their names in its state dict."""
    return {_without_wrappers(name): layer for name, layer in child_tuning_layers(model).items()}


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def fit_state_dict(
    model: nn.Module, config: ChildTuningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Check a file's tensors against the model, make room for them, and name them as the model does.

    Args:
        model: A model whose layers have the adapter.
        config: The adapter's configuration.
        adapter_name: The adapter.
        state_dict: The file's tensors, and those of other parts of the adapter, which pass through.

    Returns:
        The tensors by their names in the model's state dict.

    Raises:
        FormatError: If a tensor is damaged, or does not fit the base model. Nothing has changed then.
        ValueError: If the base model has other weights, and `check_base` is 'error'; or if the configuration did not
            come with the file, and says that the child network or its gradient mask must be another.
    """
    layers = {path: layer for path, layer in _layers(model).items() if layer.has_adapter(adapter_name)}
    bases = _loadable(layers, adapter_name, state_dict)
    children, remapped = read_children(state_dict)
    _warn_of_other_heads(model, remapped)
    sizes: dict[str, ChildSize] = {}
    dtypes: dict[str, torch.dtype] = {}
    found = _BaseCheck()
    mask = config.gradient_mask()
    for path, layer in layers.items():
        present = layer.named_deltas(adapter_name)
        for parameter, name in layer.targets_of(adapter_name).items():
            if name not in children:  # nothing was chosen there
                continue
            child = children.pop(name)
            found.compare(layer, config, adapter_name, parameter, child)
            _check_mask(config, name, mask, child.mask)
            if mask is not None:
                remapped[f"{path}.{MASK}.{adapter_name}.{parameter}"] = (child.mask or mask).pack()
            delta = child.delta.to(precise_dtype(child.delta))
            remapped[f"{path}.{DELTA}.{adapter_name}.{parameter}"] = alike(delta, present.get(name))
            remapped[f"{path}.{INDEX}.{adapter_name}.{parameter}"] = _unsealed(child.block)
            sizes[name], dtypes[name] = child.size(), delta.dtype
    if children:
        raise FormatError(f"'{next(iter(children))}' is no parameter that this adapter targets in this base model.")
    if not sizes:
        raise FormatError("The file holds no child network; it was saved before one was chosen.")
    if config.present_sizes != sizes and config.variant != "extracted":  # the configuration is not the file's own
        _check_density(config, sum(map(numel_of, bases)), sum(size.chosen for size in sizes.values()))
    if config.check_base != "off":
        found.report(config.check_base, len(sizes))
    for layer in layers.values():
        layer.allocate(adapter_name, sizes, dtypes, trainable=not config.inference_mode)
    config.present_sizes = sizes
    return remapped


def _warn_of_other_heads(model: nn.Module, saved_whole: Mapping[str, Tensor]) -> None:
    """Say what torch's error of sizes that differ will not say: how to load the base."""
    present = dict(model.named_parameters())
    for name, tensor in saved_whole.items():
        shape = shape_of(present.get(name, tensor))
        if shape != tensor.shape:
            warnings.warn(
                f"'{name}' is {tuple(tensor.shape)} in the file and {tuple(shape)} in the model. Load the base of a "
                f"classifier with num_labels={len(tensor)}, and with ignore_mismatched_sizes=True if it has a head.",
                stacklevel=2,
            )
            return


def _loadable(
    layers: Mapping[str, ChildTuningLayer], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> list[nn.Parameter]:
    """The base parameters that an adapter targets; raises if no file can be loaded into its deltas any more."""
    for layer in layers.values():
        for name, delta in layer.parameters_of(adapter_name).items():
            check_not_optimized(name, delta, "load the adapter")
    bases = [base for layer in layers.values() for base in layer.base_parameters(adapter_name).values()]
    if any(map(is_partitioned, bases)):  # the ranks will gather them together, so they must have the same file
        check_equal({"tensors of the adapter file (digest)": digest(state_dict)[:12]})
    return bases


class _BaseCheck:
    """Compares base weights with those that an adapter was made on.

    Attributes:
        differing: Names of parameters with other values.
        quantised: Names of quantised ones, which cannot be compared with values that were not.
    """

    def __init__(self) -> None:
        self.differing: list[str] = []
        self.quantised: list[str] = []

    def compare(
        self, layer: ChildTuningLayer, config: ChildTuningConfig, adapter_name: str, parameter: str, child: StoredChild
    ) -> None:
        """Compare one parameter; raises if the child network does not fit."""
        name, base = layer.targets_of(adapter_name)[parameter], layer.base_parameter(parameter)
        check_numel(name, child, base)
        indices = child.sparse_delta(name).indices
        came_alone = child.size() != (config.present_sizes or {}).get(name)  # without its configuration
        if config.variant == "random" and came_alone and name in layer.named_deltas(adapter_name):
            drawn = layer.indices(adapter_name, parameter)
            if not drawn.is_meta and not drawn.cpu().equal(indices):
                raise ValueError(
                    f"The random child network of '{name}' must be the one that was saved; the one here was drawn "
                    "with another seed, another density, or another version of peft_child."
                )
        if layer.merged:
            return
        with gathered_whole([base]):
            if fingerprints_differ(child.header.fingerprint, fingerprint_of(base, indices)):
                self.differing.append(name)
        if child.header.fingerprint and is_quantised(base) and not has_offloaded_params(layer.get_base_layer()):
            self.quantised.append(name)

    def report(self, check_base: str, count: int) -> None:
        """Warn of what was found in `count` parameters, or raise if `check_base` is `"error"`."""
        if self.quantised:
            warnings.warn(
                "The adapter was made on a base model that was not quantised. This one is, in "
                f"{len(self.quantised)} of {count} tensors with a child network, such as '{self.quantised[0]}': they "
                "are not compared. Pass check_base='off' if this is meant.",
                stacklevel=2,
            )
        if not self.differing:
            return
        hint = "Load the same base model and revision, or pass check_base='off'."
        if all(_NEW.intersection(name.split(".")) for name in self.differing):
            hint = "What a checkpoint lacks has other random weights each time: give task_type, so that a new head is "
            hint += "saved whole, and name other new parts in modules_to_save."
        message = (
            f"The base model has other weights than the one this adapter was made on, in {len(self.differing)} of "
            f"{count} tensors with a child network, such as '{self.differing[0]}'. {hint}"
        )
        if check_base == "error":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _check_density(config: ChildTuningConfig, targeted: int, chosen: int) -> None:
    wanted = config.child_size(targeted)
    if chosen > wanted or (chosen < wanted and config.granularity != INPUT_CHANNEL):
        raise ValueError(
            f"The saved child network must have the density of the configuration, {config.density}; it has {chosen} "
            f"of {targeted} entries."
        )


def _check_mask(config: ChildTuningConfig, name: str, mask: GradientMask | None, stored: GradientMask | None) -> None:
    if stored is None or config.variant == "extracted":
        return
    # Whether it is by channel is for the file to say: a resumed run goes on as it began.
    if mask is None or stored._replace(step=mask.step, by_channel=mask.by_channel) != mask:
        raise ValueError(
            f"The gradient mask of '{name}' must be the one that the adapter was trained with, {stored.describe()}; "
            f"this configuration says {mask.describe() if mask else 'none'}."
        )


def _unsealed(block: Tensor) -> Tensor:
    """The block with the checksum of its delta set to 0 (unknown), since training will change the delta."""
    data = with_delta_checksum(block.cpu().numpy().data, 0)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(block.device)
