"""The exception types that diffmax raises beside ValueError and TypeError."""


class DiffmaxError(RuntimeError):
    """Base of diffmax's own exceptions."""


class NoBackendError(DiffmaxError):
    """No backend can run the call, or the one that was named cannot. The message gives each candidate's reasons."""


class BackendError(DiffmaxError):
    """A backend that was chosen is broken: its kernel cannot be imported."""
