"""The checks of attention, and their kit for backends."""
