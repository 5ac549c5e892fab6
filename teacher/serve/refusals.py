"""What is said where a request is not answered, in OpenAI's shape."""

from typing import Any

from starlette.responses import JSONResponse, Response

from teacher.wire import Refused


def error_of(status: int, message: str, field: str | None) -> dict[str, Any]:
    """JSON data; `field` is what it is about."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


def refusal(refused: Refused) -> Response:
    """The response, with when to come again where that helps."""
    response = failure(refused.status, str(refused), refused.field)
    if refused.status in (429, 503):
        response.headers["retry-after"] = "1"
    if refused.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def failure(status: int, message: str, field: str | None) -> Response:
    """The response for a message."""
    return JSONResponse(error_of(status, message, field), status)
