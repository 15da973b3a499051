"""Child-Tuning as its authors' code does it, written anew and plainly: dense gradients, scores and masks.

Every parameter is in the optimizer. The Fisher information comes from a loop that collects the gradients of all
parameters, the child network from a percentile of all scores joined, and the mask is multiplied into the dense
gradient at every step.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn


class MaskedAdamW(torch.optim.AdamW):
    """AdamW that multiplies gradients by masks of ones and zeros first.

    Args:
        parameters: All parameters of the model.
        masks: Boolean masks by parameter, in its shape; parameters without one are updated in full.
        **settings: Those of AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], masks: Mapping[nn.Parameter, Tensor], **settings: object):
        super().__init__(parameters, **settings)
        self.masks = masks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of AdamW on the masked gradients."""
        for parameter, mask in self.masks.items():
            parameter.grad *= mask
        super().step(closure)


def estimate_fisher(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], examples: list[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss of examples that come one at a time, clipped, and with dropout."""
    model.train()
    scores = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        model(**example).loss.backward()
        for name, parameter in parameters.items():
            torch.nn.utils.clip_grad_norm_(parameter, 1.0)
            scores[name] += parameter.grad**2 / len(examples)
        model.zero_grad()
    return scores


def select_largest(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Boolean masks of the scores that reach a percentile of all of them; ties can make them many more."""
    joined = np.concatenate([score.cpu().numpy().ravel() for score in scores.values()])
    threshold = np.percentile(joined, (1 - density) * 100)
    return {name: score >= threshold for name, score in scores.items()}
