"""`python -m diffmax`: one module per command."""
