"""vLLM's load format `peft_child`: the base model's checkpoint, with a child network added as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader

from peft_child.files.adapter_folder import SparseAdapter, open_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.patch import Patch, open_patch
from peft_child.files.patched import PatchedCheckpoint
from peft_child.integrations.locate import locate_adapter, locate_checkpoint


OWN_KEYS = ("adapter", "revision", "subfolder")  # of `model_loader_extra_config`


def open_source(name: str, revision: str | None = None, subfolder: str | None = None) -> SparseAdapter | Patch:
    """An adapter, by its folder or its name on the Hub; or a patch, by a file name that ends in `.safetensors`.

    Raises:
        OSError: If it is not found.
        FormatError: If it is damaged.
    """
    if name.endswith(".safetensors"):
        return open_patch(name)
    return open_adapter(locate_adapter(name, revision, subfolder=subfolder))


def configured_source(load_config: LoadConfig) -> SparseAdapter | Patch:
    """What `load_format="peft_child"` names; raises a `ValueError` if it names nothing."""
    name, revision, subfolder = map(load_config.model_loader_extra_config.get, OWN_KEYS)
    if name is None:
        raise ValueError("load_format='peft_child' needs model_loader_extra_config={'adapter': NAME_OR_FOLDER}.")
    return open_source(name, revision, subfolder)


def base_checkpoint(model_config: ModelConfig, load_config: LoadConfig) -> Checkpoint:
    """The checkpoint that an engine loads."""
    return Checkpoint(locate_checkpoint(model_config.model, model_config.revision, cache=load_config.download_dir))


class ChildNetworkLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a base model with a child network, without a merged copy of the checkpoint.

    Weights change in the stream of checkpoint tensors, before the model fuses, shards or quantises them. So it works
    for every architecture and parallelism, and the weights are those of the merged checkpoint, bit for bit.

    Args:
        load_config: With `model_loader_extra_config={"adapter": NAME}`, see `open_source`, and `"revision"` and
            `"subfolder"` if needed. Other keys are those of vLLM's own loader.

    Raises:
        ValueError: If no adapter is named.
        OSError: If the adapter is not found.
        FormatError: If it is damaged.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self.source = configured_source(load_config)
        extra = {key: value for key, value in load_config.model_loader_extra_config.items() if key not in OWN_KEYS}
        super().__init__(replace(load_config, load_format="hf", model_loader_extra_config=extra))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint with the child network added.

        Raises:
            NamesDifferError: If the checkpoint lacks a tensor of the adapter.
            ValueError: If a tensor has another size, or other values than those that the adapter was made on.
        """
        base = PatchedCheckpoint(base_checkpoint(model_config, self.load_config))
        names = set(base.names(self.source))
        for name, tensor in super().get_all_weights(model_config, model):
            if name in names:
                part, tensor = base.part(self.source, name, tensor), tensor.clone()  # the file may be mapped
                tensor.view(-1).index_copy_(0, part.indices.long(), part.values)
            yield name, tensor
