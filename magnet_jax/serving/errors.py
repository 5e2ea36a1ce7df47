"""What goes wrong with a request, as people read it and as programs tell it apart."""

from magnet_jax.errors import UserError


class RequestError(UserError):
    """A request that is not done: the HTTP status, a word for programs, and the field it is about.

    `retry_after` is when, in seconds, the same request may well be done.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
