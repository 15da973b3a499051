"""For swapping on a CPU: keeps the weights of vLLM's linear layers as they were loaded.

vLLM's CPU build packs them for oneDNN and AMX, and nothing can be written into packed weights. It has no option for
that, but every worker imports its extension class before it loads the model, so importing this module is what counts.
Plain linear layers are slower.
"""

from __future__ import annotations

from vllm import _custom_ops
from vllm.model_executor.layers import utils


def no_kernel(*arguments: object) -> bool:
    """No shape has a packed kernel."""
    return False


class UnpackedWeights:
    """The extension: `worker_extension_cls="peft_child.integrations.vllm_unpacked.UnpackedWeights"`."""


_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = no_kernel
