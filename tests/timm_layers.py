"""timm's DiffAttention, also without torchvision."""

import pytest

from tests.timm_standin import import_timm


def theirs():
    """The class, or a skipped test."""
    try:
        return import_timm().layers.DiffAttention
    except ImportError:
        pytest.skip("needs timm: pip install 'diffmax-core[timm]'")
