"""diffmax's conformance kit for the backend `example`."""

from diffmax.testing.conformance import BackendConformance


class TestExample(BackendConformance):
    """Every dtype that the backend claims, forward and backward; what it does not claim has to be refused with a reason."""

    backend = "example"
    device = "cpu"
