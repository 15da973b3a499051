"""vLLM's weight updates from child networks and patch files, in each of its workers.

An update has two steps, so that nothing is written before all workers have checked everything: `update_weights` reads
and checks, and `finish_weight_update` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from peft_child.files.adapter_folder import open_adapter
from peft_child.files.patch import TensorPatch, open_patch
from peft_child.files.patched import PatchedCheckpoint, overlaid
from peft_child.integrations.locate import locate_adapter
from peft_child.integrations.vllm_loader import base_checkpoint, configured_adapter


LOADING_WAY = 'load adapters with the engine instead, load_format="peft_child"'


@dataclass
class ChildNetworkUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What to serve.

    Attributes:
        adapter: Folder of an adapter, or its name on the Hub; None, without a patch, for the base alone.
        patch: A patch file, to be applied on top of what is served.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Where the adapter is in its folder.
        cancel: End the update without writing; it ends with an error, which is how vLLM ends one.
    """

    adapter: str | None = None
    patch: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    cancel: bool = False


@dataclass
class NothingToAgree(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no connection."""


class _Staged(NamedTuple):
    """A checked update: what to call it, the entries that will differ from the checkpoint, and what to write."""

    name: str
    target: dict[str, TensorPatch]
    writes: dict[str, TensorPatch]


class ChildNetworkTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Weight updates of one worker.

    The checkpoint that the engine has loaded is the base. Of the entries that differ from it, this keeps positions and
    values on the CPU, so that the base's own values can always be written back.
    """

    init_info_cls = NothingToAgree
    update_info_cls = ChildNetworkUpdate
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.served = "base"
        self.state: PatchedCheckpoint | None = None  # made when it is first needed
        self.whole = True  # False while, and after, writing fails
        self.staged: _Staged | None = None

    def init_transfer_engine(self, init_info: NothingToAgree) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Forget an update that was not finished."""
        self.staged = None

    def receive_weights(self, update_info: ChildNetworkUpdate) -> None:
        """Read and check everything; nothing is written.

        Raises:
            RuntimeError: If a file is missing or damaged, does not fit the base or its values, or if the engine does
                not hold its weights as the checkpoint does. Also if the update is cancelled.
        """
        try:
            self.staged = self._checked(update_info, self.staged)
        except Exception as error:
            self.staged = None
            raise RuntimeError(f"{error} {self.situation}") from error

    def finish_weight_update(self) -> None:
        """Write what was checked.

        Raises:
            RuntimeError: If writing fails; the next update then writes every entry that may differ from the base.
        """
        staged, self.staged = self.staged, None
        if staged is None:
            return
        state = self._state()
        self.whole = False
        for name, patch in staged.writes.items():  # whatever happens now, these may differ from the base
            state.changed[name] = overlaid(state.changed.get(name), patch)
        try:
            load_checkpoint_weight_patches(
                self.model,
                [
                    CheckpointWeightPatch(name, patch.shape, patch.values.dtype, *self._on_device(patch))
                    for name, patch in staged.writes.items()
                ],
                validate_unique_indices=False,  # they are increasing
            )
        except Exception as error:
            raise RuntimeError(f"{error} {self.situation}") from error
        state.changed, self.served, self.whole = staged.target, staged.name, True

    def shutdown(self) -> None:
        """Forget an update that was not finished."""
        self.staged = None

    @property
    def situation(self) -> str:
        """What the engine holds, in a sentence."""
        if self.whole:
            return f"The engine holds '{self.served}', whole."
        return f"The engine held '{self.served}' before, and now parts of it and of what was to come."

    def _checked(self, update: ChildNetworkUpdate, staged: _Staged | None) -> _Staged:
        if update.cancel:
            raise ValueError("The update was cancelled.")
        if staged is not None:
            raise ValueError("An update takes one adapter or one patch.")
        _check_layout(self.model_config.quantization, self.model)
        state = self._state()
        if update.patch is None:
            target = {}
            if update.adapter is not None:
                folder = locate_adapter(update.adapter, update.revision, subfolder=update.subfolder)
                target = state.with_adapter(open_adapter(folder))
        elif self.whole:
            target = state.with_patch(open_patch(update.patch))
        else:
            raise ValueError("A patch needs the weights that it was made for: swap to an adapter or the base first.")
        writes = state.way_to(target)
        for name, patch in writes.items():
            self._check_weights(name, patch._replace(values=state.values_at(name, patch.indices)))
        return _Staged(update.adapter or update.patch or "base", target, writes)

    def _check_weights(self, name: str, present: TensorPatch) -> None:
        """Check that this worker holds the present values where the checkpoint's loader would write."""
        values, indices = self._on_device(present)
        weights = values.new_full((math.prod(present.shape),), math.nan).index_copy_(0, indices.long(), values)

        def compare(held: Tensor, given: Tensor, non_blocking: bool = False) -> Tensor:
            same_kind = held.shape == given.shape and held.is_floating_point()
            given = given.to(held)
            chosen = ~given.isnan()
            if not same_kind or (self.whole and not torch.equal(held[chosen], given[chosen])):
                raise ValueError(f"The engine does not hold '{name}' as its checkpoint does; {LOADING_WAY}.")
            return held

        with _replaced_copies(compare):
            self.model.load_weights([(name, weights.view(present.shape))])

    def _on_device(self, patch: TensorPatch) -> tuple[Tensor, Tensor]:
        return patch.values.to(self.device), patch.indices.to(self.device)

    def _state(self) -> PatchedCheckpoint:
        if self.state is None:
            load_config = self.vllm_config.load_config
            state = PatchedCheckpoint(base_checkpoint(self.model_config, load_config))
            if load_config.load_format == "peft_child":
                state.changed = state.with_adapter(configured_adapter(load_config))
                self.served = load_config.model_loader_extra_config["adapter"]
            self.state = state
        return self.state


def _check_layout(quantization: str | None, model: nn.Module) -> None:
    """Refuse engines that have quantised or packed their weights."""
    if quantization is not None:
        raise ValueError(f"The engine quantises its weights ({quantization}); {LOADING_WAY}.")
    for name, module in model.named_modules():
        # Of vLLM's functions for linear layers on a CPU only those with a packed copy of the weight enclose something.
        if getattr(getattr(module, "cpu_linear", None), "__closure__", None):
            raise ValueError(
                f"vLLM has packed '{name}.weight' for this CPU; {LOADING_WAY}, or "
                'worker_extension_cls="peft_child.integrations.vllm_unpacked.UnpackedWeights".'
            )


@contextmanager
def _replaced_copies(copy: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model's loader call a function wherever it would copy into a weight."""
    original = Tensor.copy_
    Tensor.copy_ = copy  # type: ignore[method-assign]  # the way of vLLM's own sparse updates
    try:
        yield
    finally:
        Tensor.copy_ = original  # type: ignore[method-assign]
