"""Seeds every test, so that a failure repeats."""

import pytest
import torch
from hypothesis import settings

# helpers for processes of their own: to collect the stand-in device is to import it, and to turn this process into its host
collect_ignore = ["overlay.py", "ranks.py", "standin_device.py"]

settings.register_profile("diffmax", max_examples=100, deadline=None)  # deadlines measure the machine, not the code
settings.load_profile("diffmax")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
