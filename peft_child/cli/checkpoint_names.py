"""Child networks in the tensors of a checkpoint, where transformers renames, fuses or turns them on loading.

transformers can reverse this for saving. Here it reverses tensors that hold the positions of a model's parameter: what
comes out says for every entry of the checkpoint which entry of the parameter it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from peft_child.cli.base_model import load_without_memory
from peft_child.files.adapter_folder import SparseAdapter
from peft_child.files.adapter_tensors import fingerprint_of, fingerprint_of_values, fingerprints_differ
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import NamesDifferError, mismatch
from peft_child.tensors.delta import Progress, SparseDelta, places_in, silent


def in_checkpoint_names(adapter: SparseAdapter, base: Checkpoint, progress: Progress = silent) -> SparseAdapter:
    """An adapter with the names of its base's checkpoint.

    Args:
        adapter: The adapter, without modules saved whole.
        base: The checkpoint.
        progress: Wraps the loop over tensor names.

    Returns:
        The same change as entries of the checkpoint's tensors. Memory is that of all deltas, and of the positions of
        the largest parameter.

    Raises:
        NamesDifferError: If a parameter is not made of whole tensors of the checkpoint, entry by entry.
        ValueError: If the checkpoint's values are not those that the adapter was made on, or the model is unknown.
    """
    model = load_without_memory(adapter.settings, base.path)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    deltas: dict[str, SparseDelta] = {}
    for name in progress(list(adapter.deltas), "Renaming"):
        delta = adapter.deltas[name]
        if name in base.places:
            deltas[name] = delta
        elif name in shapes and shapes[name].numel() == delta.numel:
            deltas |= _parts(name, delta, model, shapes[name], base)
        else:
            raise NamesDifferError(f"Neither the model nor '{base.path}' has '{name}' with {delta.numel} entries.")
    return SparseAdapter(adapter.settings, deltas)


def _parts(
    name: str, delta: SparseDelta, model: PreTrainedModel, shape: torch.Size, base: Checkpoint
) -> Iterator[tuple[str, SparseDelta]]:
    """The child network of a parameter in the checkpoint's tensors that it is made of, by name."""
    positions = torch.arange(delta.numel).view(shape)
    prefix = f"{model.base_model_prefix}."  # which the checkpoint of a model without a head lacks
    found: dict[str, Tensor] = {
        other if other in base.places else other.removeprefix(prefix): part
        for other, part in revert_weight_conversion(model, {name: positions}).items()
    }
    for other, part in found.items():
        if other not in base.places or base.places[other].shape != tuple(part.shape) or part.dtype != torch.int64:
            raise NamesDifferError(f"'{name}' is not made of whole tensors of '{base.path}'; '{other}' is none.")
    covered = torch.zeros(delta.numel, dtype=torch.uint8)
    values = base[next(iter(found))].new_zeros(len(delta.indices))
    parts = []
    for other, part in found.items():
        flat = part.reshape(-1)
        covered[flat] += 1
        places, chosen = places_in(delta.indices, flat)
        indices = chosen.nonzero()[:, 0]
        places = places[indices]
        if len(indices):
            tensor = base[other]
            values[places] = tensor.reshape(-1)[indices]
            changes = delta.values[places]
            parts.append((other, SparseDelta(tuple(part.shape), indices, changes, fingerprint_of(tensor, indices))))
    if not (covered == 1).all():
        raise NamesDifferError(f"'{name}' is not made of tensors of '{base.path}' entry by entry.")
    if fingerprints_differ(delta.fingerprint, fingerprint_of_values(values)):
        raise ValueError(mismatch(base, name))
    return iter(parts)
