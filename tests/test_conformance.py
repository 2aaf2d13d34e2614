"""diffmax-core's own backends through the kit that vendors use."""

from diffmax.testing.conformance import BackendConformance


class TestCpu(BackendConformance):
    backend = "cpu"


class TestReference(BackendConformance):
    backend = "reference"
