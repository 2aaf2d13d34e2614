"""The kit of power attention on the backends of core."""

from diffmax.testing.power_conformance import PowerConformance


class TestReference(PowerConformance):
    backend = "reference"


class TestCPU(PowerConformance):
    backend = "cpu"
