"""Child-Tuning (Xu et al., EMNLP 2021) as an adapter for Hugging Face PEFT.

Importing this package makes PEFT know the method: `get_peft_model`, `PeftModel.from_pretrained` and the rest work with
a `ChildTuningConfig` as with any other.
"""

from peft_child.callback import ChildTuningCallback
from peft_child.choice import ChildNetwork, estimate_fisher, select_child_network
from peft_child.codec import FormatError
from peft_child.config import ChildPeftType, ChildTuningConfig
from peft_child.hooks import GradientMaskHandle, mask_gradients
from peft_child.layer import ChildTuningLayer
from peft_child.model import ChildTuningModel, next_gradient_mask
from peft_child.registration import register
from peft_child.thinning import Kept, keep_largest


__version__ = "0.1.0.dev0"

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
]

register()
