"""diffmax's conformance kit for the backend `example`."""

from diffmax.testing.conformance import BackendConformance


class TestExample(BackendConformance):
    """Every claimed dtype, forward and backward; whatever the backend does not claim must be refused with a reason."""

    backend = "example"
    device = "cpu"
