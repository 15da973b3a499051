"""Time and memory of Child-Tuning beside other methods, and what it gains on tasks (`benchmarks.glue`)."""

import warnings


# PEFT makes its SHiRA of sparse tensors, and asks transformers for an attribute that has been renamed.
warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
