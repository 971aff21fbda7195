"""Errors in OpenAI's shape: what clients of that API know how to read."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

CLIENT_HAS_GONE = 499
# (the usual number for it; nobody is left to read the body)

CRASHED = "the server failed on this request; its log says why"

ENGINE_IS_AWAY = "the engine is being started again; ask again in a moment"

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that gets no answer: HTTP status and one line of reason."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        # name of the field at fault
        self.code = code

    def body(self) -> dict[str, object]:
        """The JSON body of the error."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def respond_api_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for `ApiError`."""
    assert isinstance(error, ApiError)
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


def respond_http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown routes and wrong methods, told in the same shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; the routes are listed in docs/serving.md"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


def respond_crash(request: Request, error: Exception) -> JSONResponse:
    """An error of ours: the traceback goes to the log, the client learns no details."""
    return JSONResponse(ApiError(500, CRASHED).body(), 500)
