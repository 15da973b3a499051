"""The PEFT tuner: injects layers, assigns random child networks, and meets PEFT's state-dict hooks.

PEFT finds and replaces modules by name, one at a time. Here the configuration is resolved to parameters and their
owners before that, with everything that can be wrong about it, so that PEFT's own loop only carries out the plan and a
refused adapter leaves the model as it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_child.codec import FormatError, decode, read_header
from peft_child.config import ChildTuningConfig
from peft_child.layer import ChildTuningLayer, child_tuning_layers
from peft_child.selection import apportion, draw_random
from peft_child.targets import Owner, Target, base_modules, find_targets


@dataclass
class _Plan:
    """What one injection is to do.

    Attributes:
        entries: Targets and owners by the name under which PEFT's loop comes across the owner.
        layers: The Child-Tuning layers by the identity of their base layers.
        counts: Sizes of the random child networks to draw by name of the target, if they are to be drawn.
    """

    entries: dict[str, list[tuple[Target, Owner]]]
    layers: dict[int, ChildTuningLayer]
    counts: dict[str, int] | None


class ChildTuningModel(BaseTuner):
    """Child-Tuning layers in a base model, as PEFT's `get_peft_model` and its loaders make it.

    Args:
        model: The base model, changed in place: targeted modules are wrapped, never copied.
        peft_config: The configuration by adapter name.
        adapter_name: The adapter to inject.
    """

    prefix = "child_"
    tuner_layer_cls = ChildTuningLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        _check_name_is_free(model, adapter_name)  # PEFT would first replace the configuration of the other adapter
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # Injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> ChildTuningConfig:
        """Use a copy, since what is recorded in it belongs to this model alone; fill in default targets."""
        config: ChildTuningConfig = copy.deepcopy(peft_config)
        self.peft_config[self._name_of(peft_config)] = config
        if config.target_modules is None and config.target_parameters is None:
            super()._prepare_adapter_config(config, model_config)
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Plan the injection, and refuse it before anything has changed."""
        adapter_name = self._name_of(peft_config)
        _check_name_is_free(model, adapter_name)
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear":
            peft_config.target_modules = _all_linear(model, peft_config)
        targets = find_targets(
            model, partial(_names_module, peft_config), partial(_names_parameter, peft_config.target_parameters)
        )
        _check_targets(adapter_name, peft_config, targets)

        entries: dict[str, list[tuple[Target, Owner]]] = {}
        for target in targets:
            for owner in target.owners:
                entries.setdefault(owner.entry, []).append((target, owner))
        counts = None
        if peft_config.variant == "random" and peft_config.child_sizes is None and targets:
            sizes = {target.name: target.parameter.numel() for target in targets}
            counts = apportion(sizes, peft_config.child_size(sum(sizes.values())))
        layers = {id(layer.base_layer): layer for layer in child_tuning_layers(model).values()}
        self._plan = _Plan(entries, layers, counts)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._plan.entries:
            return True
        matched = check_target_module_exists(peft_config, key)
        return False if matched else matched  # PEFT tells excluded modules from others

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Wrap every module that is planned under the name `current_key`."""
        if current_key not in self._plan.entries:
            raise ValueError(f"The state dict names module '{current_key}', which the configuration does not target.")
        by_module: dict[int, list[tuple[Target, Owner]]] = {}
        for planned, owner in self._plan.entries[current_key]:
            by_module.setdefault(id(owner.module), []).append((planned, owner))
        for pairs in by_module.values():
            layer = self._layer_around(pairs[0][1].module)
            self._add_to_layer(layer, adapter_name, pairs)
            self._fill(layer, adapter_name, peft_config)

    def _layer_around(self, module: nn.Module) -> ChildTuningLayer:
        layer = self._plan.layers.get(id(module))
        if layer is None:
            layer = self._plan.layers[id(module)] = ChildTuningLayer(module)
            layer.train(module.training)
            _replace(self.model, module, layer)
        return layer

    def _add_to_layer(self, layer: ChildTuningLayer, adapter_name: str, pairs: list[tuple[Target, Owner]]) -> None:
        targets, ties = {}, {}
        for target, owner in pairs:
            first = target.owners[0]
            if owner == first:
                targets[owner.parameter] = target.name
            else:
                ties[owner.parameter] = (self._layer_around(first.module), first.parameter)
        layer.add_adapter(adapter_name, targets, ties)

    def _fill(self, layer: ChildTuningLayer, adapter_name: str, config: ChildTuningConfig) -> None:
        """Give an adapter its random child, or room for the one that will be loaded."""
        targets = layer.child_targets[adapter_name]
        counts = self._plan.counts
        if counts is not None:
            children = {
                parameter: draw_random(name, layer.base_parameter(parameter).numel(), counts[name], config.seed)
                for parameter, name in targets.items()
            }
            sizes = layer.set_child(adapter_name, children, config.init_weights, trainable=False)
            config.child_sizes = {**(config.child_sizes or {}), **sizes}
        elif config.child_sizes is not None:
            known = config.child_sizes
            room = {key: (known[name][1], known[name][2]) for key, name in targets.items() if name in known}
            layer.allocate(adapter_name, room, trainable=False)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Parameters were planned and wrapped with the modules; PEFT only wants to know their names."""
        is_named = partial(_names_parameter, peft_config.target_parameters)
        return [owner.name for pairs in self._plan.entries.values() for _, owner in pairs if is_named(owner.name)]

    def _name_of(self, config: PeftConfig) -> str:
        return next(name for name, known in self.peft_config.items() if known is config)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Nothing to warn of: tied weights share one delta."""

    def _check_merge_allowed(self) -> None:
        """Nothing to warn of: merging writes a tied weight once, for all its owners."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are float32 from the start, because small changes vanish in less; the user may ask for less."""
        if not autocast_adapter_dtype:
            for layer in child_tuning_layers(self.model).values():
                layer.cast_deltas(adapter_name)

    # Life

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate; other tuners choose adapters for each sample here."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Child-Tuning does not support adapter_names=, different adapters for the samples of one batch; "
                f"got {kwargs['adapter_names']!r}. Use set_adapter and one batch for each adapter."
            )
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the adapters' composed values into the base weights; `unmerge_adapter` restores every bit.

        Args:
            adapter_names: The adapters; by default the active ones.
            safe_merge: Check first that no value becomes NaN or infinite.

        Raises:
            ValueError: If an adapter is merged already or unknown, or the check finds a value. Nothing is merged then.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        layers = child_tuning_layers(self.model).values()
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter '{name}' to merge; there are {', '.join(self.peft_config)}.")
            if any(name in layer.merged_adapters for layer in layers):
                raise ValueError(
                    f"Adapter '{name}' is already merged; call unmerge_adapter() before merging it again."
                )
        self._merge(list(names), safe_merge)

    def _merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        layers = list(child_tuning_layers(self.model).values())
        if safe_merge:
            for layer in layers:
                layer.check_finite(adapter_names)
        for layer in layers:
            layer.merge(adapter_names=[name for name in adapter_names if name not in layer.merged_adapters])

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's, which leaves layers inside other layers where they are."""
        layers = list(child_tuning_layers(self.model).values())
        if merge:
            self._merge(self.active_adapters if adapter_names is None else adapter_names, safe_merge)
        else:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        for layer in layers:
            _replace(self.model, layer, layer.base_layer)
        super()._unload_and_optionally_merge(merge, progressbar)
        model: nn.Module = self.model
        return model

    # State dict

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, and keep it from adding whole base embeddings afterwards because they are targeted."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in child_tuning_layers(model).items():
            for parameter in layer.base_layer._parameters:
                state_dict.pop(f"{name}.base_layer.{parameter}", None)  # PEFT's own filtered copy
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors against the model, make room for them, and name them as the model does.

        Raises:
            FormatError: If a tensor is damaged, or does not fit the base model. Nothing has changed then.
        """
        files = {_canonical(key): (key, value) for key, value in state_dict.items()}
        layers = child_tuning_layers(model)
        remapped: dict[str, Tensor] = {}
        rooms: list[tuple[ChildTuningLayer, dict[str, tuple[int, int]]]] = []
        sizes: dict[str, list[int]] = {}
        used: set[str] = set()
        for path, layer in layers.items():
            room: dict[str, tuple[int, int]] = {}
            for parameter, name in layer.child_targets.get(adapter_name, {}).items():
                found = _child_of(files, name)
                if found is None:
                    continue
                delta, block = found
                numel = layer.base_parameter(parameter).numel()
                _check_child(name, numel, delta, block)
                room[parameter] = (delta.numel(), block.numel())
                sizes[name] = [numel, delta.numel(), block.numel()]
                remapped[f"{path}.child_delta.{adapter_name}.{parameter}"] = delta
                remapped[f"{path}.child_index.{adapter_name}.{parameter}"] = block
                used.update(key for kind in _KINDS if (key := _file_key(name, kind)))
            rooms.append((layer, room))
        for canonical, (key, value) in files.items():
            if canonical in used:
                continue
            if any(f".{kind}." in key for kind in _KINDS):
                raise FormatError(f"'{key}' belongs to no parameter that this adapter targets in this base model.")
            remapped[key] = value
        for layer, room in rooms:
            if adapter_name in layer.child_targets:
                is_active = adapter_name in layer.active_adapters and not layer.disable_adapters
                layer.allocate(adapter_name, room, trainable=is_active and not config.inference_mode)
        config.child_sizes = sizes or None
        return remapped


_KINDS = ("child_delta", "child_index")


def _canonical(key: str) -> str:
    """A key as it would be in a base model without other adapter layers, whose names stand in between."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _file_key(name: str, kind: str) -> str:
    """The canonical key of one tensor of the child of parameter `name`."""
    path, _, parameter = name.rpartition(".")
    return f"{path}.{kind}.{parameter}"


def _child_of(files: dict[str, tuple[str, Tensor]], name: str) -> tuple[Tensor, Tensor] | None:
    delta, block = (files.get(_file_key(name, kind)) for kind in _KINDS)
    if delta is None and block is None:
        return None
    if delta is None or block is None:
        missing = _KINDS[0] if delta is None else _KINDS[1]
        raise FormatError(f"The file has one tensor of the child of '{name}' without the other: {missing} is missing.")
    return delta[1], block[1]


def _check_child(name: str, numel: int, delta: Tensor, block: Tensor) -> None:
    if block.dtype != torch.uint8 or block.dim() != 1 or delta.dim() != 1 or not delta.is_floating_point():
        raise FormatError(
            f"The child of '{name}' must be a 1-D uint8 index block and a 1-D floating point delta, got "
            f"{block.dtype} {tuple(block.shape)} and {delta.dtype} {tuple(delta.shape)}."
        )
    try:
        data = block.cpu().numpy().data
        header = read_header(data)
        if header.numel != numel:
            raise FormatError(f"It belongs to a tensor of {header.numel} entries, the base model's has {numel}.")
        if header.size != delta.numel():
            raise FormatError(f"Its index has {header.size} positions and its delta {delta.numel()} values.")
        decode(data)
    except FormatError as error:
        raise FormatError(f"The child of '{name}' cannot be loaded. {error}") from error


# What a configuration names


def _names_module(config: ChildTuningConfig, path: str) -> bool | None:
    matched = check_target_module_exists(config, path)
    return None if isinstance(matched, _ExcludedModule) else bool(matched)


def _names_parameter(target_parameters: Collection[str] | str | None, name: str) -> bool:
    if not target_parameters:
        return False
    if isinstance(target_parameters, str):
        return re.fullmatch(target_parameters, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def _all_linear(model: nn.Module, config: ChildTuningConfig) -> set[str]:
    """Names of all linear layers but the head, as PEFT understands 'all-linear', also under earlier adapters."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    head = head.base_layer if isinstance(head, ChildTuningLayer) else head
    return {
        place.path
        for place in base_modules(model)
        if isinstance(place.module, (nn.Linear, Conv1D)) and place.module is not head
    }


# Checks of a new adapter


def _check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    if any(adapter_name in layer.child_targets for layer in child_tuning_layers(model).values()):
        raise ValueError(
            f"The base model already has a Child-Tuning adapter named '{adapter_name}'; choose another adapter_name, "
            "or unload() the first model."
        )


def _check_targets(adapter_name: str, config: ChildTuningConfig, targets: list[Target]) -> None:
    owners = [owner for target in targets for owner in target.owners]
    if any(adapter_name == owner.parameter for owner in owners):
        raise ValueError(
            f"adapter_name must not be the name of a parameter of a targeted module, got '{adapter_name}'."
        )

    for owner in owners:
        if any(re.match(rf"(.*\.)?{module}($|\.)", owner.path) for module in config.modules_to_save or ()):
            raise ValueError(
                f"'{owner.name}' is tied to a targeted weight and trained densely (modules_to_save); a tensor can be "
                "only one of the two."
            )

    wanted = config.target_parameters or []
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        single = entry if isinstance(wanted, str) else [entry]
        if not any(_names_parameter(single, owner.name) for owner in owners):
            raise ValueError(
                f"target_parameters must each match a parameter of the base model; '{entry}' matches none."
            )

    numels = {target.name: target.parameter.numel() for target in targets}
    for name, (numel, _, _) in (config.child_sizes or {}).items():
        if numels.get(name) != numel:
            here = f"{numels[name]} entries" if name in numels else "no such target"
            raise ValueError(
                f"The adapter does not fit the base model: its '{name}' has {numel} entries, the model has {here}."
            )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of the model where `old` stands, but not inside `new` itself."""
    for module in list(model.modules()):
        if module is not new:
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new
