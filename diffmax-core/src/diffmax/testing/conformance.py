"""The kit of the row operator, under the name that backends import."""

from diffmax.testing.rows.conformance import DTYPES, BackendConformance, Kit, every_dtype

__all__ = ["DTYPES", "BackendConformance", "Kit", "every_dtype"]
