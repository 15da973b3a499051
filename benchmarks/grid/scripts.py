"""The examples as modules, so that benchmarks use what users run; loading one imports all that it needs."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).parents[2] / "examples"


@cache
def load(name: str) -> ModuleType:
    """One of the example scripts, without running its `main`; the same module each time."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
