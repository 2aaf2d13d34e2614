"""Checks of power attention."""
