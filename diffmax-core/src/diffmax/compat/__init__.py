"""Compatibility modules: the names and signatures of other packages, on diffmax's operators."""
