"""Extract an adapter from the difference between two checkpoints, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peft_child.files.adapter_folder import PEFT_TYPE, SparseAdapter
from peft_child.files.adapter_tensors import fingerprint_of
from peft_child.files.checkpoint import Checkpoint
from peft_child.tensors.channels import ChannelLayout, choose_channels
from peft_child.tensors.delta import Progress, SparseDelta, change, check_share, count_different, extract_delta, silent
from peft_child.tensors.lazy import Lazy
from peft_child.tensors.topk import Cutoff, choose, find_cutoff


_EMBEDDING = re.compile(r"emb|wte|shared")  # also the names in GPT-2 and T5
_VOCABULARY = re.compile(r"embed_tokens|word_embeddings|wte|shared")  # without those of positions and token types
FLOATING = ("F32", "BF16", "F16", "F64")


def extract_adapter(
    base: Checkpoint, tuned: Checkpoint, density: float | None = None, progress: Progress = silent
) -> SparseAdapter:
    """Make an adapter of the difference between two checkpoints of the same shapes.

    Without a density every entry that differs in a bit belongs to the child network, and merging the adapter into the
    base gives the tuned checkpoint bit for bit. With a density the child network has exactly `round(density * n)` of
    the n floating point entries, those that changed most. Tensors are read one at a time, and every delta is computed
    on access, so the checkpoints must not change until the adapter is written.

    Changes of integer and FP8 tensors are refused, since no delta expresses them. Without a density, so are changes
    whose exact difference needs more than the 53 bits of a float64, such as from 1e30 to 1.
    The adapter uses the names of the checkpoint. `merge_checkpoint` and `export_patch` can always apply it, but PEFT
    only if the model has the same names: transformers renames or fuses tensors of some architectures on loading.

    Args:
        base: The checkpoint before fine-tuning.
        tuned: The checkpoint after it.
        density: Share of the entries to keep, in (0, 1], or None for all that differ.
        progress: Wraps the loops over tensor names.

    Returns:
        The adapter. Without a density, access to a delta raises `ValueError` if it cannot express the change exactly.

    Raises:
        ValueError: If the checkpoints do not have the same tensors and shapes, nothing differs, a tensor that is not
            floating point differs, or `density` is out of range.
    """
    if density is not None:
        check_share("density", density)
    names = _comparable(base, tuned)
    numel = sum(base.places[name].numel for name in names)
    cutoff = None
    if density is not None:
        size = round(density * numel)
        if not size:
            raise ValueError(f"density={density} of {numel} entries is an empty child network.")
        changes = Lazy(
            names, lambda name: _scores(name, base[name], tuned[name]), lambda names: progress(names, "Comparing")
        )
        cutoff = find_cutoff(changes, size)
    # Counted first, since an adapter names only tensors that have chosen entries.
    cutoffs, chosen = _count(base, tuned, progress(names, "Counting"), cutoff)
    deltas = Lazy(cutoffs, lambda name: _extract(name, base[name], tuned[name], cutoffs[name]))
    if not deltas:
        raise ValueError(f"'{base.path}' and '{tuned.path}' do not differ in any floating point entry.")
    return _adapter_of(base, deltas, density or chosen / numel)


def extract_channels(
    base: Checkpoint, tuned: Checkpoint, density: float, progress: Progress = silent
) -> SparseAdapter:
    """As `extract_adapter`, but keep whole input channels: those with the largest mean squared change.

    A checkpoint does not say what its tensors are for, so their names and shapes decide. A channel is the row of a
    token in tensors named like embeddings, a column in other matrices (also in GPT-2, which stores its weights
    transposed), an input channel of a convolution with its kernels, all of a bias, and an entry of another vector.

    Args:
        base: As in `extract_adapter`.
        tuned: As in `extract_adapter`.
        density: Share of the entries to keep at most, in (0, 1].
        progress: As in `extract_adapter`.

    Raises:
        ValueError: As `extract_adapter`, and if the density is too small for one channel.
    """
    check_share("density", density)
    names = _comparable(base, tuned)
    layouts = {
        name: ChannelLayout.of_shape(
            base.places[name].shape, is_bias=name.endswith("bias"), by_rows=bool(_EMBEDDING.search(name))
        )
        for name in names
    }
    scores = {
        name: layouts[name].sums(_scores(name, base[name], tuned[name]).square_())
        for name in progress(names, "Comparing")
    }
    budget = round(density * sum(layout.numel for layout in layouts.values()))
    found = {name: numbers for name, numbers in choose_channels(scores, layouts, budget).items() if len(numbers)}

    def extract(name: str) -> SparseDelta:
        positions = layouts[name].positions(found[name])
        return _delta_at(name, base[name], tuned[name], positions)._replace(layout=layouts[name])

    adapter = _adapter_of(base, Lazy(found, extract), density)
    adapter.settings["granularity"] = "input_channel"
    return adapter


def _adapter_of(base: Checkpoint, deltas: Mapping[str, SparseDelta], density: float) -> SparseAdapter:
    for name in deltas:
        if "." not in name:
            raise ValueError(f"'{name}' belongs to the top-level module, which an adapter cannot reach.")
    settings = {
        "peft_type": PEFT_TYPE,
        "variant": "extracted",
        "density": density,
        "target_parameters": list(deltas),
        "base_model_name_or_path": str(base.path),
    }
    return SparseAdapter(settings, deltas)


def _comparable(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Names of the floating point tensors, after a check that both checkpoints have the same tensors."""
    for first, second in ((base, tuned), (tuned, base)):
        missing = sorted(first.places.keys() - second.places.keys())
        if missing:
            raise ValueError(
                f"'{second.path}' lacks {len(missing)} tensors of '{first.path}', such as '{missing[0]}'."
                f"{_why_missing(missing, first, second)}"
            )
    for name, place in base.places.items():
        other = tuned.places[name]
        if (place.dtype, place.shape) != (other.dtype, other.shape):
            hint = " Load one of them in the dtype of the other, and save it." if place.shape == other.shape else ""
            raise ValueError(
                f"'{name}' is {place.dtype} {place.shape} in '{base.path}' and {other.dtype} {other.shape} in "
                f"'{tuned.path}'; they must be the same.{hint}"
            )
    names = [name for name, place in base.places.items() if place.dtype in FLOATING and 0 not in place.shape]
    for name in base.places.keys() - set(names):
        if not torch.equal(base[name], tuned[name]):
            raise ValueError(
                f"'{name}' differs and is {base.places[name].dtype}; only floating point changes can be kept."
            )
    return names


def _why_missing(missing: list[str], first: Checkpoint, second: Checkpoint) -> str:
    """What is likely to be the reason that a checkpoint lacks tensors of another one."""
    without_prefix = {name.partition(".")[2] for name in second.places}
    if any(name in without_prefix or name.partition(".")[2] in second.places for name in missing):
        return " Their names differ by a prefix: save both as models of one class."
    vocabulary = {place.shape for name, place in second.places.items() if _VOCABULARY.search(name)}
    tied = any(len(shape) > 1 and shape in vocabulary for shape in (first.places[name].shape for name in missing))
    return " A head that is tied to the embeddings is saved only once: save both alike." if tied else ""


def _count(
    base: Checkpoint, tuned: Checkpoint, names: Iterable[str], cutoff: Cutoff | None
) -> tuple[dict[str, Cutoff | None], int]:
    """The cutoff of each tensor that has chosen entries, and the number of these in all tensors.

    A cutoff of None chooses all entries that differ; that of the first tensor is given.
    """
    found, chosen = {}, 0
    for name in names:
        here = cutoff  # before `choose` counts off the ties in this tensor
        if cutoff is None:
            size = count_different(base[name], tuned[name])
        else:
            indices, cutoff = choose(change(base[name], tuned[name]), cutoff)
            size = indices.numel()
        if size:
            found[name], chosen = here, chosen + size
    return found, chosen


def _scores(name: str, before: Tensor, after: Tensor) -> Tensor:
    _check_finite(name, before, after)
    return change(before, after)


def _check_finite(name: str, before: Tensor, after: Tensor) -> None:
    # Values that are not finite may stay as they are; only what changes has to be finite.
    bad = ~(before.isfinite() & after.isfinite())
    count = count_different(before[bad], after[bad])
    if count:
        raise ValueError(f"Weights that changed must be finite before and after; {count} values of '{name}' are not.")


def _extract(name: str, before: Tensor, after: Tensor, cutoff: Cutoff | None) -> SparseDelta:
    # Chosen again for every tensor, since the positions of all of them would take too much memory.
    return _delta_at(name, before, after, None if cutoff is None else choose(change(before, after), cutoff)[0])


def _delta_at(name: str, before: Tensor, after: Tensor, indices: Tensor | None) -> SparseDelta:
    """The change of one tensor at some positions, or wherever it differs."""
    _check_finite(name, before, after)
    try:
        delta = extract_delta(before, after, indices)
    except ValueError as error:
        raise ValueError(f"The change of '{name}' cannot be kept. {error}") from error
    matrix = (before.shape[0], before[0].numel()) if before.dim() else (1, 1)
    return delta._replace(shape=matrix, fingerprint=fingerprint_of(before, delta.indices))
