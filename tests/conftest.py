"""Seeds every test, so that a failure repeats."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("diffmax", max_examples=100, deadline=None)  # deadlines measure the machine, not the code
settings.load_profile("diffmax")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
