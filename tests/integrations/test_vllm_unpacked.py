"""Weights that vLLM's CPU build would pack."""

import subprocess
import sys
from pathlib import Path

import pytest

from .engines import UNPACKED, engine, save_llama, vllm


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PACKED = """
import sys
from tests.integrations.engines import engine
with engine(sys.argv[1]) as llm:
    (model,) = llm.collective_rpc(lambda worker: worker.model_runner.get_model())
    print("packed", model.model.layers[0].mlp.down_proj.cpu_linear.__closure__ is not None)
"""


def test_the_weights_are_kept(tmp_path):
    base = save_llama(tmp_path / "base")
    with engine(base, **UNPACKED) as llm:
        (model,) = llm.collective_rpc(lambda worker: worker.model_runner.get_model())
        layer = model.model.layers[0].mlp.down_proj
        assert layer.weight.shape == (128, 192)
        assert layer.cpu_linear.__closure__ is None
    code = [sys.executable, "-c", PACKED, str(base)]  # a process that has not imported the extension
    run = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "packed True" in run.stdout
    assert vllm._custom_ops._supports_onednn is False
