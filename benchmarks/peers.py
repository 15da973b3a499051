"""A model under each of the methods that are compared, with everything that one does with it, in phases."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_model
from torch import Tensor, nn

from benchmarks.authors import MaskedAdamW
from benchmarks.measure import DEVICE
from benchmarks.shapes import Shape, build, linear_layers, targeted
from peft_child import ChildTuningConfig, ChildTuningLayer, mask_gradients
from peft_child.files.adapter_folder import read_adapter


METHODS = {
    "native": "base, targeted weights with gradients",
    "full": "full fine-tuning",
    "authors": "the authors' CT_D",
    "hooks": "gradient hooks of CT_D",
    "shira": "PEFT SHiRA",
    "lora": "PEFT LoRA, r = 8",
    "lora_same": "PEFT LoRA, as many values",
    "task_driven": "**Child-Tuning, CT_D**",
    "random": "**Child-Tuning, random**",
    "channels": "**Child-Tuning, input channels**",
    "task_free": "**Child-Tuning, CT_F**",
}
OURS = ("task_driven", "random", "channels", "task_free")
ADAPTERS = ("shira", "lora", "lora_same", *OURS)
STEP = ("forward", "backward", "optimizer")


class Peer:
    """A model under one method, with its optimizer.

    Args:
        shape: Of the model.
        method: One of `METHODS`.
        density: Share of the targeted weights in the child network; other methods get as many trained values.
        chosen: Folder of a task-driven adapter, whose child network all methods that need one take; None for others.
    """

    def __init__(self, shape: Shape, method: str, density: float, chosen: Path | None) -> None:
        self.model = build(shape).to(DEVICE)
        self.method = method
        if method in ADAPTERS:
            self.model = adapt(self.model, method, density, chosen)
        if method == "native":
            self.model.requires_grad_(False)
            for _, parameter in targeted(self.model):
                parameter.requires_grad_(True)
        if method == "hooks":
            mask_gradients(self.model.named_parameters(), child_network=positions(chosen))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # The Trainer's default, and the fastest AdamW there is, for all methods.
        make = partial(MaskedAdamW, masks=masks(self.model, chosen)) if method == "authors" else torch.optim.AdamW
        self.optimizer = make(self.trained, lr=1e-4, fused=True)

    def training(self, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
        """The phases of a step; the native model has no optimizer."""
        return {
            "_train": self.model.train,
            "forward": partial(self._forward, batch),
            "backward": lambda: self.loss.backward(),
            "optimizer" if self.method != "native" else "_drop": self._update,
        }

    def inference(self, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
        """A forward pass."""
        return {"_eval": self.model.eval, "inference": partial(self._infer, batch)}

    def merging(self, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
        """Merging, a forward pass, and unmerging, where there is an adapter."""
        if self.method not in ADAPTERS:
            return {}
        return {
            "merge": self.model.merge_adapter,
            "merged inference": partial(self._infer, batch),
            "unmerge": self.model.unmerge_adapter,
        }

    def filing(self, folder: Path) -> dict[str, Callable[[], object]]:
        """Saving, loading beside the first one, and switching between the two, with plain copies of the same bytes."""
        if self.method == "full":
            return self._filing_whole(folder)
        return {
            "save": partial(self.model.save_pretrained, folder),
            "file copy": partial(copy_weights, folder),
            "load": partial(self._load, folder),
            "switch": partial(self.model.set_adapter, "other"),
            "_merge": self.model.merge_adapter,
            "_there": partial(self._switch_merged, "default"),  # what was decoded before is so again
            "_back": partial(self._switch_merged, "other"),
            "merged switch": partial(self._switch_merged, "default"),
            "memory copy": self._copy_child,
            "_unmerge": self.model.unmerge_adapter,
            "_delete": partial(self.model.delete_adapter, "other"),
        }

    def _filing_whole(self, folder: Path) -> dict[str, Callable[[], object]]:
        other = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return {
            "save": partial(self.model.save_pretrained, folder),
            "file copy": partial(copy_weights, folder),
            "load": lambda: load_model(self.model, str(folder / "model.safetensors"), device=str(DEVICE)),
            "merged switch": partial(self.model.load_state_dict, other),
            "memory copy": lambda: [tensor.clone() for tensor in other.values()],
        }

    def _forward(self, batch: Mapping[str, Tensor]) -> None:
        self.loss = self.model(**batch).loss

    def _update(self) -> None:
        if self.method != "native":
            self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def _infer(self, batch: Mapping[str, Tensor]) -> None:
        self.model(**batch)

    def _load(self, folder: Path) -> None:
        self.model.load_adapter(folder, "other")
        for module in self.model.modules():
            if isinstance(module, ChildTuningLayer):
                for parameter in module.targets_of("other"):  # decodes the indices, as the first use would
                    list(module.children_of(parameter, ["other"]))

    def _switch_merged(self, adapter: str) -> None:
        self.model.unmerge_adapter()
        self.model.set_adapter(adapter)
        self.model.merge_adapter()

    def _copy_child(self) -> None:
        """Copy the values that are trained, and as many positions where there are any."""
        positioned = self.method in ("shira", "task_driven", "random")
        for parameter in self.trained:
            parameter.detach().clone()
            if positioned:
                parameter.detach().view(torch.int32).clone()


def adapt(model: nn.Module, method: str, density: float, chosen: Path) -> PeftModel:
    """Add the adapter of a method."""
    if method == "task_driven":
        return PeftModel.from_pretrained(model, chosen, is_trainable=True)
    return get_peft_model(model, adapter_config(method, density, model))


def adapter_config(method: str, density: float, model: nn.Module) -> PeftConfig:
    """The configuration of an adapter for all linear layers, with about as many values as a child network."""
    layers = linear_layers(model)
    names = list(layers)
    if method == "channels":  # random ones: a step costs the same for all
        settings = {"variant": "random", "granularity": "input_channel"}
        return ChildTuningConfig(density=density, target_modules=names, **settings)
    if method in OURS:
        return ChildTuningConfig(variant=method, density=density, target_modules=names)
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())
    same = max(1, round(density * sum(parameter.numel() for _, parameter in targeted(model)) / per_rank))
    if method == "shira":
        return ShiraConfig(r=same, target_modules=names)
    return LoraConfig(r=same if method == "lora_same" else 8, target_modules=names)


def positions(chosen: Path) -> dict[str, Tensor]:
    """The child network of a saved adapter, flat indices by name of the parameter."""
    return {name: delta.indices.to(DEVICE) for name, delta in read_adapter(chosen).deltas.items()}


def masks(model: nn.Module, chosen: Path) -> dict[nn.Parameter, Tensor]:
    """The same child network as dense masks by parameter."""
    child, found = positions(chosen), {}
    for name, parameter in targeted(model):
        found[parameter] = torch.zeros_like(parameter, dtype=torch.bool)
        if name in child:
            found[parameter].view(-1)[child[name]] = True
    return found


def weights_file(folder: Path) -> Path:
    """The file of tensors that a method saved."""
    return next(folder.glob("*.safetensors"))


def copy_weights(folder: Path) -> None:
    """Copy the file of tensors to another folder."""
    shutil.copyfile(weights_file(folder), folder / "copy")
