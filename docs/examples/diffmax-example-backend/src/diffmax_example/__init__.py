"""A backend of diffmax. Nothing to import here: diffmax finds it by its entry point."""
