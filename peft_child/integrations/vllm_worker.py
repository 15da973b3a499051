"""vLLM's weight updates from child networks and patch files, in each of its workers.

An update has two steps, so that nothing is written before all workers have checked everything: `update_weights` reads
and checks, and `finish_weight_update` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from peft_child.files.patch import Patch, TensorPatch
from peft_child.files.patched import Change, PatchedCheckpoint
from peft_child.integrations.vllm_loader import base_checkpoint, configured_source, open_source
from peft_child.integrations.vllm_placement import Placement, UnplaceableError, place


LOADING_WAY = 'load adapters with the engine instead, load_format="peft_child"'


@dataclass
class ChildNetworkUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What to serve.

    Attributes:
        adapter: Folder of an adapter, its name on the Hub, or a patch file, which is applied on top of what is there;
            None for the base alone.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Where the adapter is in its folder.
        cancel: End the update without writing; it ends with an error, which is how vLLM ends one.
    """

    adapter: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    cancel: bool = False


@dataclass
class NothingToAgree(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no connection."""


class _Staged(NamedTuple):
    """A checked update: what to call it, the way to it, and where to write."""

    name: str
    change: Change
    placements: dict[str, Placement]


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
        self.whole = True  # False after writing has failed
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
        try:
            for name, parts in staged.change.writes.items():
                for part in parts:
                    staged.placements[name].write(*self._on_device(part))
        except Exception as error:
            state.mark_torn(staged.change)
            self.whole = False
            raise RuntimeError(f"{error} {self.situation}") from error
        state.changed, self.served, self.whole = staged.change.changed, staged.name, True

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
            raise ValueError("An update takes one adapter or patch.")
        check_layout(self.model_config.quantization, self.model)
        state = self._state()
        change = self._way_to(update, state)
        tensors = {name: (parts[-1].shape, parts[-1].values.dtype) for name, parts in change.writes.items()}
        try:
            placements = place(self.model, tensors)
        except UnplaceableError as error:
            raise ValueError(
                f"The engine keeps its weights in another way than their checkpoint; {LOADING_WAY}. {error}"
            ) from error
        for name, parts in change.writes.items():
            for part in parts if self.whole else ():
                self._check_present(name, part, placements[name], state)
        return _Staged(update.adapter or "base", change, placements)

    def _way_to(self, update: ChildNetworkUpdate, state: PatchedCheckpoint) -> Change:
        if update.adapter is None:
            return state.to_base()
        source = open_source(update.adapter, update.revision, update.subfolder)
        if isinstance(source, Patch) and not self.whole:
            raise ValueError("A patch needs the weights that it was made for: swap to an adapter or the base first.")
        return state.to(source)

    def _check_present(self, name: str, part: TensorPatch, placement: Placement, state: PatchedCheckpoint) -> None:
        """Check that this worker holds what the state says where a patch is going to be written."""
        changed = state.changed.get(name)
        if changed is None or part.indices is not changed.indices:
            assert part.replaced is not None
            differ = placement.differ(*self._on_device(part._replace(values=part.replaced))).to(part.indices.device)
            if changed is None and not differ.any():
                return
            indices = part.indices[differ]
            changed = part._replace(indices=indices, values=state.values_at(name, indices))
        if placement.differ(*self._on_device(changed)).any():
            raise ValueError(f"The engine does not hold '{name}' as its checkpoint has it; {LOADING_WAY}.")

    def _on_device(self, patch: TensorPatch) -> tuple[Tensor, Tensor]:
        return patch.indices.to(self.device), patch.values.to(self.device)

    def _state(self) -> PatchedCheckpoint:
        if self.state is None:
            load_config = self.vllm_config.load_config
            state = PatchedCheckpoint(base_checkpoint(self.model_config, load_config))
            if load_config.load_format == "peft_child":
                state.changed = state.to(configured_source(load_config)).changed
                self.served = load_config.model_loader_extra_config["adapter"]
            self.state = state
        return self.state


def check_layout(quantization: str | None, model: nn.Module) -> None:
    """Raise a `ValueError` if an engine has quantised or packed its weights."""
    if quantization is not None:
        raise ValueError(f"The engine quantises its weights ({quantization}); {LOADING_WAY}.")
    for name, module in model.named_modules():
        # Of vLLM's functions for linear layers on a CPU only those with a packed copy of the weight enclose something.
        if getattr(getattr(module, "cpu_linear", None), "__closure__", None):
            raise ValueError(
                f"vLLM has packed '{name}.weight' for this CPU; {LOADING_WAY}, or "
                'worker_extension_cls="peft_child.integrations.vllm_unpacked.UnpackedWeights".'
            )
