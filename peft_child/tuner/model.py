"""The PEFT tuner: injects layers, assigns random child networks, and implements PEFT's state-dict hooks.

PEFT matches and replaces modules by name, one at a time. Before its loop starts, `_prepare_model` resolves the
configuration to parameters and the modules that own them, and makes every check. The loop then only carries out this
plan, so that an adapter that is refused leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from peft_child.files.adapter_folder import WITHOUT_SELECTION
from peft_child.files.adapter_tensors import INDEX
from peft_child.layers.layer import ChildTuningLayer, child_tuning_layers
from peft_child.layers.mixed_batch import MixedBatch, check_mixed_batch, heads_by_row
from peft_child.layers.packed import backend_of
from peft_child.tensors.combine import combine_named, density_of
from peft_child.tensors.delta import SparseDelta, fresh_delta
from peft_child.tensors.distributed import check_has_values
from peft_child.tensors.partitioned import numel_of
from peft_child.tuner.config import ChildTuningConfig
from peft_child.tuner.drawing import DRAWN, drawn_child, drawn_children, is_of_a_file
from peft_child.tuner.injection import (
    Parents,
    check_name_is_free,
    check_sizes,
    check_vocabulary,
    keep_buffers_from_ddp,
    parents_of,
    remove_adapter,
    replace_everywhere,
    unwrap,
    warn_of_half_precision,
)
from peft_child.tuner.state_dict import fit_state_dict, tensors_to_save
from peft_child.tuner.targets import Owner, Target, all_linear, find_targets, names_parameter


def next_gradient_mask(model: nn.Module) -> None:
    """Count one optimizer step on all deltas of a model, so that random gradient masks are redrawn.

    Only for engines whose optimizer is not a `torch.optim.Optimizer`. Steps of a torch optimizer on the deltas, or on
    DeepSpeed's copies of them, are counted automatically.

    Args:
        model: A model with Child-Tuning adapters; call this once after each optimizer step.
    """
    for layer in child_tuning_layers(model).values():
        layer.count_step()


class _Plan(NamedTuple):
    """What one injection is to do.

    Attributes:
        entries: Targets and owners by module, under the name at which PEFT's loop reaches the module.
        layers: The Child-Tuning layers of the model by base layer.
        parents: For every module, each of its parent modules and its name in that parent.
        drawn: The child networks by name of the target, if they need neither data nor a file.
        awaits_file: Whether there has to be room for the child networks of a file.
        quantisation: What PEFT's quantisation backends need to know of the model.
    """

    entries: dict[str, dict[nn.Module, list[tuple[Target, Owner]]]]
    layers: dict[nn.Module, ChildTuningLayer]
    parents: Parents
    drawn: Mapping[str, SparseDelta] | None
    awaits_file: bool
    quantisation: dict[str, Any]


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
    _plan = _Plan({}, {}, {}, None, False, {})

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_name_is_free(model, adapter_name)  # before PEFT, which would overwrite the other adapter's configuration
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter that is refused leaves nothing behind."""
        check_name_is_free(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            remove_adapter(model, adapter_name)
            raise
        finally:  # drop the plan: FSDP2 replaces parameters, and the plan would keep the old ones alive
            # The keys stay, for PEFT's `inspect_matched_modules`.
            self._plan = _Plan({key: {} for key in self._plan.entries}, {}, {}, None, False, {})
        keep_buffers_from_ddp(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters is None:
            super()._prepare_adapter_config(peft_config, model_config)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Plan the injection, and refuse it before anything has changed."""
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear":
            peft_config.target_modules = all_linear(model, peft_config)
        targets = find_targets(model, peft_config)
        numels = {target.name: numel_of(target.parameter) for target in targets}
        check_sizes(peft_config.child_sizes or {}, numels)
        check_vocabulary(model, targets)

        entries: dict[str, dict[nn.Module, list[tuple[Target, Owner]]]] = {}
        for target in targets:
            for owner in target.owners:
                by_module = entries.setdefault(owner.place.entry, {})
                by_module.setdefault(owner.place.module, []).append((target, owner))
        layers = {layer.base_layer: layer for layer in child_tuning_layers(model).values()}
        awaits_file = is_of_a_file(targets, peft_config)
        if not peft_config.inference_mode:
            warn_of_half_precision(model, peft_config)
        drawn = None if awaits_file else drawn_children(targets, peft_config)
        quantisation = get_quantization_kwargs(model)
        self._plan = _Plan(entries, layers, parents_of(model), drawn, awaits_file, quantisation)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._plan.entries:
            return True
        matched = check_target_module_exists(peft_config, key)
        return False if matched else matched  # a falsy result is passed on: PEFT tells excluded from unmatched modules

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
        for module, pairs in self._plan.entries[current_key].items():
            if any(adapter_name == owner.parameter for _, owner in pairs):  # PEFT would confuse them in state dicts
                raise ValueError(
                    f"adapter_name must not be the name of a parameter of a targeted module, got '{adapter_name}'."
                )
            targets, ties = {}, {}
            for planned, owner in pairs:
                first = planned.owners[0]
                if owner is first:
                    targets[owner.parameter] = planned.name
                else:
                    ties[owner.parameter] = (self._layer_around(first.place.module), first.parameter)
            layer = self._layer_around(module)
            layer.add_adapter(adapter_name, targets, ties, peft_config.gradient_mask())
            self._fill(layer, adapter_name, peft_config)

    def _layer_around(self, module: nn.Module) -> ChildTuningLayer:
        layer = self._plan.layers.get(module)
        if layer is None:
            backend = backend_of(module, self._plan.quantisation)
            layer = self._plan.layers[module] = ChildTuningLayer(module, backend)
            layer.train(module.training)
            replace_everywhere(self._plan.parents, module, layer)
        return layer

    def _fill(self, layer: ChildTuningLayer, adapter_name: str, config: ChildTuningConfig) -> None:
        """Give an adapter a child network that needs no data, or room for the one that will be loaded."""
        children = self._plan.drawn
        if children is None:
            children = self._children_of_twin(layer, adapter_name, config)
        if children is not None:
            layer.set_child(adapter_name, children, trainable=False)
        if self._plan.awaits_file and config.child_sizes is not None:
            layer.allocate(adapter_name, config.child_sizes, trainable=False)
        if config.child_sizes is not None or config.inference_mode:  # the configuration of an adapter being loaded
            layer.mark_unloaded(adapter_name, partial(drawn_child, config) if config.variant in DRAWN else None)

    def _children_of_twin(
        self, layer: ChildTuningLayer, adapter_name: str, config: ChildTuningConfig
    ) -> dict[str, SparseDelta] | None:
        """Fresh deltas on the child networks of another adapter that has this very configuration object.

        TRL adds such an adapter as the reference, a frozen copy of the first one.
        """
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if not twins or not layer.has_adapter(twins[0]) or not layer.is_chosen(twins[0]):
            return None
        bases = layer.base_parameters(adapter_name)
        return {
            name: fresh_delta(bases[name], delta.indices, config.init_weights, delta.layout)
            for name, delta in layer.sparse_deltas(twins[0]).items()
        }

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Return the names that PEFT asks for; the parameters were planned and wrapped with the modules."""
        modules = [pairs for by_module in self._plan.entries.values() for pairs in by_module.values()]
        names = [owner.name for pairs in modules for _, owner in pairs]
        return [name for name in names if names_parameter(peft_config.target_parameters, name)]

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Nothing to warn of: tied weights share one delta."""

    def _check_merge_allowed(self) -> None:
        """Nothing to warn of: merging writes a tied weight once, for all its owners."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas start as float32, where small changes are not lost; without autocast they get the base's dtype."""
        if not autocast_adapter_dtype:
            for layer in child_tuning_layers(self.model).values():
                layer.cast_deltas(adapter_name)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's; refused before anything has changed if an adapter targets what would be resized."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if isinstance(module, ChildTuningLayer):
                raise ValueError(
                    f"The {type(module.base_layer).__name__} to be resized has a child network, which belongs to its "
                    "present size: resize the base model before the adapter is added, or leave the module out."
                )
        return self.model.resize_token_embeddings(*args, **kwargs)

    # Running and merging

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate; with `adapter_names=` each row has an adapter of its own."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = child_tuning_layers(self.model).values()
        merged = any(layer.merged for layer in layers)
        check_mixed_batch(names, self.peft_config, self.training, merged)
        mixed = MixedBatch(list(names), kwargs.get("num_beams") or 1)
        with heads_by_row(self.model, mixed):
            try:
                for layer in layers:
                    layer.mixed_batch = mixed
                yield
            finally:
                for layer in layers:
                    layer.mixed_batch = None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the adapters' composed values into the base weights; `unmerge_adapter` restores every bit.

        Args:
            adapter_names: The adapters; by default those that each layer has active.
            safe_merge: Check first that no value becomes NaN or infinite.

        Raises:
            ValueError: If an adapter is unknown, or the check finds a NaN or infinite value. Nothing is merged then.
        """
        if not self._merge(adapter_names, safe_merge):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def _check_known(self, adapter_names: list[str]) -> None:
        for name in adapter_names:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter '{name}'; there are {', '.join(self.peft_config)}.")

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool) -> bool:
        """Merge what is not merged yet, by default of what each layer has active; all layers are checked first.

        Returns:
            Whether there was something to merge.
        """
        self._check_known(adapter_names or [])
        left = {}
        for layer in child_tuning_layers(self.model).values():
            names = layer.active_adapters if adapter_names is None else adapter_names
            left[layer] = [name for name in names if layer.has_adapter(name) and name not in layer.merged_adapters]
            layer.check_mergeable(left[layer], safe_merge)
        for layer, names in left.items():
            if names:
                layer.merge(adapter_names=names)
        return any(left.values())

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Add an adapter that combines others on the union of their child networks; see `combine_deltas`.

        Args:
            adapters: Names of the adapters to combine.
            weights: One weight for each adapter.
            adapter_name: Name of the new adapter, which is not made active.
            combination_type: 'linear', 'ties', 'dare_linear', 'dare_ties' or 'magnitude_prune'.
            density: Share of each adapter's child network that is kept, in (0, 1]; by default all of it.
            majority_sign_method: For 'ties' and 'dare_ties', 'total' or 'frequency'.
            seed: Seed of the random drops of 'dare_linear' and 'dare_ties'.

        Raises:
            ValueError: If an adapter is unknown or has modules saved whole, the new name is taken, or an argument is
                out of range.
            RuntimeError: If the child network of an adapter has not been chosen.
        """
        self._check_known(adapters)
        for name in adapters:
            if cast(ChildTuningConfig, self.peft_config[name]).modules_to_save:
                raise ValueError(f"Modules saved whole cannot be combined, and adapter '{name}' has some.")
            for layer in child_tuning_layers(self.model).values():
                layer.check_is_chosen(name, "combining")
        combine = combine_named(
            [self._sparse_deltas(name) for name in adapters],
            weights,
            combination_type=combination_type,
            density=1.0 if density is None else density,
            majority_sign_method=majority_sign_method,
            seed=seed,
        )
        combined = dict(combine)
        check_name_is_free(self.model, adapter_name)
        settings = WITHOUT_SELECTION | {"target_parameters": list(combined), "density": density_of(combined)}
        self.peft_config[adapter_name] = replace(cast(ChildTuningConfig, self.peft_config[adapters[0]]), **settings)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in child_tuning_layers(self.model, adapter_name).values():
            layer.set_child(adapter_name, combined, trainable=False)

    def _sparse_deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        found: dict[str, SparseDelta] = {}
        for layer in child_tuning_layers(self.model, adapter_name).values():
            for name, delta in layer.sparse_deltas(adapter_name).items():
                check_has_values(f"The child network of '{name}'", delta.values)
                found[name] = delta
        return found

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's, but also takes out layers inside other layers, which PEFT would leave there."""
        layers = list(child_tuning_layers(self.model).values())
        if merge:
            self._merge(adapter_names, safe_merge)
        else:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        unwrap(self.model, layers)
        super()._unload_and_optionally_merge(merge, progressbar)
        keep_buffers_from_ddp(self.model)
        model: nn.Module = self.model
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT's for modules saved whole, without reading their `weight`: a head of several layers has none."""
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        keep_buffers_from_ddp(self.model)

    # State dict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's, but first checks the child networks of all layers, and then makes room for them.

        In a whole model's state dict, a layer without a child network is one in which nothing was chosen.
        """
        layers = {f"{prefix}{name}.": layer for name, layer in child_tuning_layers(self).items()}
        if any(layer.is_optimized() for layer in layers.values()):
            if any(f".{INDEX}." in key for key in state_dict):
                for path, layer in layers.items():
                    layer.check_same_child(state_dict, path)
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        found = {
            adapter: {path: layer.sizes_in(state_dict, path, adapter) for path, layer in layers.items()}
            for adapter in self.peft_config
        }
        for adapter, by_path in found.items():
            if not any(sizes for sizes, _ in by_path.values()):
                continue
            for path, (sizes, dtypes) in by_path.items():
                # A layer without sizes is emptied only if its base weights are here: the state dict may be partial.
                targets = [f"{path}base_layer.{parameter}" for parameter in layers[path].targets_of(adapter)]
                if sizes or any(target in state_dict for target in targets):
                    layers[path].make_room(adapter, sizes, dtypes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, with checksums, and without whole base embeddings, which PEFT would add if they are targeted.

        The sizes of the child network are recorded in the configuration, which is saved next.
        """
        return tensors_to_save(model, cast(ChildTuningConfig, config), adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors and make room for them; an adapter that was added for a bad file is removed again."""
        try:
            return fit_state_dict(model, config, adapter_name, state_dict)
        except ValueError:
            layers = child_tuning_layers(model).values()
            if any(layer.is_unloaded(adapter_name) for layer in layers) and isinstance(model, PeftModel):
                if len(model.peft_config) > 1:
                    model.delete_adapter(adapter_name)
                else:
                    model.unload()
            raise
