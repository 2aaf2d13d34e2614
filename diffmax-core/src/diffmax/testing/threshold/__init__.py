"""Checks of threshold attention."""
