"""API keys: read from a file, asked of every request that reaches the engine or its figures."""

import hmac
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from openkeye.apps.http_api.errors import ApiError, respond_api_error
from openkeye.common.checks import InputError

OPEN_PATHS = ("/", "/health")
# A page without data, and what load balancers ask. Everything below /web is the page's too.


def read_keys(path: Path) -> list[bytes]:
    """One key a line; empty lines and lines that begin with # are left out.

    Raises:
        InputError: the file cannot be read or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"{path}: the file of API keys cannot be read ({reason}); give a text file with one key a line"
        ) from None
    keys = [line.strip().encode() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path}: no API key in it; write one a line")
    return keys


class KeyCheck:
    """Lets a request through whose `Authorization: Bearer KEY` names one of the keys."""

    def __init__(self, app: ASGIApp, keys: list[bytes]) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]) and not self._is_known(scope):
            message = "no valid API key; send it as the header Authorization: Bearer KEY"
            await respond_api_error(Request(scope), ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or path.startswith("/web/")

    def _is_known(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        # Every key is compared, each in constant time, so that the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)
