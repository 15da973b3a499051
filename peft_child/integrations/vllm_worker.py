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
        load_config = self.vllm_config.load_config
        self.served = "base"
        self.state = PatchedCheckpoint(base_checkpoint(self.model_config, load_config))
        if load_config.load_format == "peft_child":
            self.state.changed = self.state.to(configured_source(load_config)).changed
            self.served = load_config.model_loader_extra_config["adapter"]
        self.staged: _Staged | None = None
        self.whole = True  # whether the engine holds the state, and not parts of it and of another

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
        try:
            for name, parts in staged.change.writes.items():
                for part in parts:
                    staged.placements[name].write(*self._on_device(part))
        except BaseException as error:  # an interruption as well
            self.state.mark_torn(staged.change)
            self.whole = False
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(f"{error} {self.situation}") from error
        self.state.changed, self.served, self.whole = staged.change.changed, staged.name, True

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
        source = None
        if update.adapter is not None:
            source = open_source(update.adapter, update.revision, update.subfolder)
        if isinstance(source, Patch) and not self.whole:
            raise ValueError("A patch needs the weights that it was made for: swap to an adapter or the base first.")
        change = self.state.to_base() if source is None else self.state.to(source)
        placements = self._placements(change)
        for name, part in change.changed.items() if self.whole else ():
            present = part._replace(values=self.state.values_at(name, part.indices, part.replaced))
            if placements[name].differ(*self._on_device(present)).any():
                raise ValueError(f"The engine does not hold '{name}' as its checkpoint has it; {LOADING_WAY}.")
        return _Staged(update.adapter or "base", change, placements)

    def _placements(self, change: Change) -> dict[str, Placement]:
        """Where this worker keeps the tensors of a change."""
        parts = {**{name: parts[-1] for name, parts in change.writes.items()}, **change.changed}
        try:
            return place(self.model, {name: (part.shape, part.values.dtype) for name, part in parts.items()})
        except UnplaceableError as error:
            raise ValueError(
                f"The engine keeps its weights in another way than their checkpoint; {LOADING_WAY}. {error}"
            ) from error

    def _on_device(self, patch: TensorPatch) -> tuple[Tensor, Tensor]:
        return patch.indices.to(self.device), patch.values.to(self.device)


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
