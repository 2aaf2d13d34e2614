"""Adapters to other libraries. Each is an explicit import: `import diffmax` loads none of them."""
