"""Plugins and dispatch: discovery, checks and lists of backends, and the selection of a backend per call."""
