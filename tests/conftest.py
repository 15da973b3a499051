import os

import pytest
import torch
from hypothesis import settings


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
torch.set_num_threads(1)  # the models are tiny; more threads would wait for each other

settings.register_profile("quiet", database=None, deadline=None, derandomize=True)  # no files, same run every time
settings.load_profile("quiet")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["entry", "input_channel"])
def granularity(request, monkeypatch):
    """Child networks of the tests are of single entries, and then of input channels."""
    from .helpers import DEFAULTS  # here, since the tests of vLLM do without PEFT

    monkeypatch.setitem(DEFAULTS, "granularity", request.param)
    if request.param == "input_channel":  # of which the small models have few
        monkeypatch.setitem(DEFAULTS, "density", 0.5)
    return request.param
