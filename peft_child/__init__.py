"""Child-Tuning (Xu et al., EMNLP 2021) as an adapter for Hugging Face PEFT.

Importing this package registers the method with PEFT: `get_peft_model`, `PeftModel.from_pretrained` and the rest then
take a `ChildTuningConfig` like any other configuration. Where models are only served, PEFT need not be installed.
"""

from importlib.util import find_spec

from peft_child.tensors.codec import FormatError


__version__ = "0.1.0"

__all__ = [
    "ChildNetwork",
    "ChildPeftType",
    "ChildTuningCallback",
    "ChildTuningConfig",
    "ChildTuningLayer",
    "ChildTuningModel",
    "FormatError",
    "GradientMaskHandle",
    "Kept",
    "estimate_fisher",
    "keep_largest",
    "mask_gradients",
    "next_gradient_mask",
    "select_child_network",
    "weight_magnitudes",
]

if find_spec("peft") is not None:
    from peft_child.integrations.registration import register
    from peft_child.integrations.trainer import ChildTuningCallback
    from peft_child.layers.layer import ChildTuningLayer
    from peft_child.selection.prune import Kept, keep_largest
    from peft_child.selection.select import ChildNetwork, estimate_fisher, select_child_network, weight_magnitudes
    from peft_child.tuner.config import ChildPeftType, ChildTuningConfig
    from peft_child.tuner.mask_hooks import GradientMaskHandle, mask_gradients
    from peft_child.tuner.model import ChildTuningModel, next_gradient_mask

    register()
else:

    def __getattr__(name: str) -> object:
        """Say what a public name needs."""
        if name in __all__:
            raise ImportError(f"peft_child.{name} needs PEFT: pip install 'peft>=0.21'.")
        raise AttributeError(f"module 'peft_child' has no attribute '{name}'")
