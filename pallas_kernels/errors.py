"""Errors that kernels raise; `jaxllm.errors` re-exports them so that users meet one family."""


class ShapeError(ValueError):
    """An array has the wrong shape or dtype for the call."""


class UnsupportedError(NotImplementedError):
    """A named choice cannot be served here; the message says what would work."""


class CapacityError(RuntimeError):
    """A bound (memory, cache, queue, context) does not admit the request."""
