"""Reading a request's body within limits."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from openkeye.apps.http_api.errors import CLIENT_HAS_GONE, ApiError
from openkeye.apps.http_api.limits import ServerLimits


async def read_json_body(request: Request, limits: ServerLimits) -> bytes:
    """The body, not yet parsed.

    Raises:
        ApiError: 400 for another content type, 408 for one that comes too slowly, 413 for one that is too large.
    """
    # A web page elsewhere may make a browser send forms and plain text to us without asking; JSON it may not.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, f"content type {content_type or 'none'!r:.80}; send Content-Type: application/json")
    body = bytearray()
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes <= limits.max_body_bytes:
                    body += chunk
                elif num_bytes > 2 * limits.max_body_bytes:
                    break
                # A body that is somewhat too large is read to its end and dropped: clients read no answer while they send.
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:g} seconds; send it again") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_HAS_GONE, "the client closed the connection") from None
    if num_bytes > limits.max_body_bytes:
        raise ApiError(413, f"the body has more than {limits.max_body_bytes:,} bytes; send a smaller file or a part of it")
    return bytes(body)
