"""Registers Child-Tuning with PEFT, and replaces transformers' `push_to_hub`.

PEFT's own `register_peft_method` takes only members of PEFT's enum, which cannot be extended. The dictionaries that it
fills are keyed by strings, so entries under our own one-member enum are found there like any other.

transformers has no registry for `push_to_hub`, so the method is replaced in its class. For models without a
Child-Tuning adapter the replacement calls the original with the same arguments.
"""

from __future__ import annotations

from typing import Any

from peft import mapping
from transformers.utils.hub import PushToHubMixin

from peft_child.integrations.hub import bringing_cards
from peft_child.tuner.config import ChildPeftType, ChildTuningConfig
from peft_child.tuner.model import ChildTuningModel


def register() -> None:
    """Register Child-Tuning with PEFT; calling this again changes nothing.

    Raises:
        RuntimeError: If PEFT, or another package, uses the name or the prefix for something else.
    """
    kind = ChildPeftType.PEFT_CHILD
    configs: dict[Any, Any] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = mapping.PEFT_TYPE_TO_PREFIX_MAPPING

    known = configs.get(kind, ChildTuningConfig)
    if known.__module__ != ChildTuningConfig.__module__:  # not by identity: a reloaded module has a new class
        raise RuntimeError(
            f"PEFT already has a method '{kind.value}' ({known.__module__}.{known.__qualname__}), so peft_child "
            "cannot register its own; import only one of the two."
        )
    for name, prefix in prefixes.items():
        if prefix == ChildTuningModel.prefix and name != kind:
            raise RuntimeError(f"The parameter prefix '{prefix}' already belongs to PEFT's method '{name}'.")
    configs[kind], tuners[kind], prefixes[kind] = ChildTuningConfig, ChildTuningModel, ChildTuningModel.prefix

    mixin: Any = PushToHubMixin  # of `PeftModel`, and of transformers' models with adapters of their own
    mixin.push_to_hub = bringing_cards(mixin.push_to_hub)
