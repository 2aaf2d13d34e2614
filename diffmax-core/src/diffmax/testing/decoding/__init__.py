"""The checks of attention over a cache, and their kit for backends."""
