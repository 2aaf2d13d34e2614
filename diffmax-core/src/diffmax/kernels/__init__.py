"""Kernels that backends share. They are imported by a backend's distribution, never by diffmax itself."""
