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
