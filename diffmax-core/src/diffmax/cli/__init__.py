"""`python -m diffmax`: one module for each of its commands."""
