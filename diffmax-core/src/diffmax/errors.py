"""The exception types that diffmax raises in addition to ValueError and TypeError."""


class DiffmaxError(RuntimeError):
    """Base of diffmax's own exceptions."""


class NoBackendError(DiffmaxError):
    """No backend can run the call, or the requested backend cannot. The message lists the reasons of each candidate."""


class BackendError(DiffmaxError):
    """The selected backend is broken: its kernel cannot be imported, or returns what it must not."""
