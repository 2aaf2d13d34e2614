"""The exception types that diffmax raises beside ValueError and TypeError."""


class DiffmaxError(RuntimeError):
    """Base of diffmax's own exceptions."""


class NoBackendError(DiffmaxError):
    """No backend can run the call. The message gives each candidate's reason."""
