"""What kits share whose operator has a table of cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest
import torch

from diffmax.errors import NoBackendError
from diffmax.testing.rows.conformance import DTYPES, Kit, dtype_id

low = pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize < 8], ids=dtype_id)


class Case(Protocol):
    """One call."""

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that it needs."""


def every_case_of(cases: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with `case`."""
    return pytest.mark.parametrize("case", cases.values(), ids=[name.replace(" ", "-") for name in cases])


class CaseKit(Kit):
    """A kit whose operator has a table of cases."""

    @property
    def features(self) -> frozenset[str]:
        """What the backend claims for the forward."""
        return self.description.provided[self.operators[0]].features

    def passes_or_is_refused(self, check: Callable[..., None], case: Case, dtype: torch.dtype) -> None:
        """The check of a forward, or, of what is not claimed, that the call is refused with the reason."""
        if self.claims(dtype, *case.features(), backward=False):
            check(self.backend, self.device, case, dtype)
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*(lacks|not {dtype_id(dtype)})"):
                check(self.backend, self.device, case, dtype)
