"""The gradient mask alone, as hooks on any parameters, with no adapter: Child-Tuning on top of other methods."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_child.tensors.gradient_mask import GradientMask
from peft_child.tensors.mask_steps import MaskUse, count_steps, numbered


class GradientMaskHandle:
    """Hooks that mask gradients, until they are removed; also a context manager that removes them at its end.

    Made by `mask_gradients`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], child: Mapping[str, Tensor], mask: GradientMask) -> None:
        self._by_name = dict(parameters)
        self._masks = dict.fromkeys(parameters, mask)
        self._handles = []
        number = numbered(self)
        count_steps(number)
        for name, parameter in parameters.items():
            use = MaskUse(number, name) if mask.density < 1 else None
            self._handles.append(parameter.register_hook(partial(_masked, self, child.get(name), use)))

    def remove(self) -> None:
        """Take the hooks away; calling it again changes nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> GradientMaskHandle:
        """The handle itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the hooks."""
        self.remove()

    def masked(self, key: str, gradient: Tensor) -> Tensor:
        """The gradient of a parameter with its present mask."""
        return self._masks[key].apply(key, gradient)

    def count_step(self, stepped: Container[int] | None = None) -> None:
        """Advance to the masks of the next optimizer step: automatic with torch's optimizers, called by other engines.

        Args:
            stepped: The `id()` of each parameter that was updated; by default all were.
        """
        for name, parameter in self._by_name.items():
            if stepped is None or id(parameter) in stepped:
                mask = self._masks[name]
                self._masks[name] = mask._replace(step=mask.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the masks by name of the parameter, packed into int64 tensors of shape `(4,)`."""
        return {name: mask.pack() for name, mask in self._masks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the masks of an interrupted run.

        Raises:
            ValueError: If the names of the parameters, or the settings of their masks, are not the same.
        """
        masks = {name: GradientMask.unpack(packed) for name, packed in state.items()}
        if masks.keys() != self._masks.keys():
            raise ValueError(
                f"The masks must belong to the same parameters; the saved ones are of {_some(masks)}, those here are "
                f"of {_some(self._masks)}."
            )
        for name, mask in masks.items():
            if mask._replace(step=0) != self._masks[name]._replace(step=0):
                raise ValueError(
                    f"The gradient mask of '{name}' must have the settings that it was saved with, {mask.describe()}; "
                    f"got {self._masks[name].describe()}."
                )
        self._masks = masks


def mask_gradients(
    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    *,
    density: float = 1.0,
    seed: int = 0,
    resample_every: int = 1,
    child_network: Mapping[str, Tensor] | None = None,
) -> GradientMaskHandle:
    """Mask the gradients of any parameters, without an adapter: LoRA matrices, a head, or a whole model.

    With `density`, every entry keeps its gradient with that probability, kept gradients are scaled by its inverse, and
    the mask is redrawn every `resample_every` optimizer steps (Child-Tuning_F; Xu et al., 2021). With `child_network`,
    only fixed entries keep their gradients (Child-Tuning_D as the authors train it, with dense tensors). With both,
    the two masks are multiplied.

    A hook sees gradients and nothing else. An optimizer with weight decay or momentum still moves masked entries, its
    state stays dense, and nothing is saved sparsely: the fixed child network of an adapter has none of these limits.
    Where parameters are sharded (FSDP, ZeRO-3), a hook sees pieces of gradients, or none at all; use an adapter there.

    Args:
        parameters: What `torch.optim.Optimizer` takes as well: parameters, or pairs of name and parameter, such as
            `model.named_parameters()`. Frozen ones are left alone. Without names the position stands for the name.
        density: Probability of keeping a gradient, in (0, 1].
        seed: Seed of the masks, from 0 to 2**63 - 1. Masks also depend on the names.
        resample_every: Number of optimizer steps for which a mask is used before it is redrawn.
        child_network: By name, the flat row-major positions that keep their gradients, int64, shape `(k,)`.
            Parameters that it does not name keep all gradients.

    Returns:
        A handle to remove the hooks, and to save and load the number of the present step.

    Raises:
        ValueError: If there is no parameter that requires gradients, one comes twice or is masked already, or an
            argument is out of range or names unknown parameters.
    """
    mask = GradientMask(density, seed, resample_every).checked()
    named = _named(parameters)
    child = dict(child_network or {})
    _check_child(named, child)
    return GradientMaskHandle(named, child, mask)


def _named(parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    if isinstance(parameters, (Tensor, Mapping)) or not isinstance(parameters, Iterable):
        raise ValueError(
            "mask_gradients needs parameters, or pairs of name and parameter such as model.named_parameters(), got a "
            f"{type(parameters).__name__}."
        )
    named: dict[str, Tensor] = {}
    for position, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) else (str(position), item)
        if name in named or any(parameter is other for other in named.values()):
            raise ValueError(f"Every parameter and name may be given only once; '{name}' or its tensor comes twice.")
        if _is_masked(parameter):
            raise ValueError(f"The gradient of '{name}' is masked already; remove that handle first.")
        if parameter.requires_grad:
            named[name] = parameter
    if not named:
        raise ValueError("mask_gradients needs at least one parameter that requires gradients, got none.")
    return named


def _is_masked(parameter: Tensor) -> bool:
    hooks: Iterable[Any] = (parameter._backward_hooks or {}).values()
    return any(isinstance(hook, partial) and hook.func is _masked for hook in hooks)


def _check_child(named: Mapping[str, Tensor], child: Mapping[str, Tensor]) -> None:
    for name, indices in child.items():
        if name not in named:
            raise ValueError(f"child_network names '{name}', which is none of {_some(named)}.")
        numel = named[name].numel()
        if indices.dtype != torch.int64:
            raise ValueError(f"Positions in '{name}' must be int64, got {indices.dtype}.")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < numel:
            raise ValueError(f"Positions in '{name}' must lie in [0, {numel}).")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(f"'{name}'" for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _masked(handle: GradientMaskHandle, indices: Tensor | None, mask: MaskUse | None, gradient: Tensor) -> Tensor:
    """The gradient hook. It keeps the handle alive: `MaskUse` finds it by a number, through a weak reference."""
    if indices is not None:
        flat, indices = gradient.reshape(-1), indices.to(gradient.device)
        gradient = torch.zeros_like(flat).index_copy_(0, indices, flat[indices]).view(gradient.shape)
    return gradient if mask is None else mask.apply(gradient)
