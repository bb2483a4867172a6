"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}. What a client sent is never repeated."""

import msgspec

LONGEST = 400  # characters of a message


class ErrorDetail(msgspec.Struct):
    """message: for people. type: of the kind of error. param: the field at fault. code: for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error. headers: of the response."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= LONGEST else message[:LONGEST] + "..."
        self.param, self.headers = param, headers or {}
        self.code = code or type(self).code

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(ErrorDetail(self.message, self.type, self.param, self.code))


class BadRequest(ApiError):
    """The request itself is wrong; asking again does not help."""


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class NotFound(ApiError):
    status, type, code = 404, "not_found_error", "not_found"


class WrongMethod(ApiError):
    status, code = 405, "method_not_allowed"


class TooSlow(ApiError):
    status, code = 408, "request_timeout"


class TooLarge(ApiError):
    status, code = 413, "request_too_large"


class WrongType(ApiError):
    status, code = 415, "unsupported_media_type"


class TooManyRequests(ApiError):
    """Of one key. Others may still ask."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class ServerFault(ApiError):
    status, type, code = 500, "server_error", "internal_error"


class Unavailable(ApiError):
    """Not now: the queue is full, the server is about to end, the engine is gone."""

    status, type, code = 503, "service_unavailable_error", "overloaded"


class DeadlinePassed(ApiError):
    """Its time was over before it had its turn."""

    status, type, code = 504, "timeout_error", "timeout"


class ClientGone(Exception):
    """Nobody is there to read an answer: the client hung up, or does not take what it is sent."""
