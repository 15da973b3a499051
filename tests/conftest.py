import os

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
torch.set_num_threads(1)  # the models are tiny; more threads would wait for each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
