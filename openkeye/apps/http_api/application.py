"""The application: routes, and the layers that every request passes.

RequestCount -> KeyCheck -> Starlette (errors in OpenAI's shape) -> the route.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from openkeye.apps.http_api.chat import ChatEndpoint
from openkeye.apps.http_api.errors import ENGINE_IS_AWAY, ApiError, respond_api_error, respond_crash, respond_http_error
from openkeye.apps.http_api.keys import KeyCheck
from openkeye.apps.http_api.limits import ServerLimits
from openkeye.apps.http_api.media_rules import MediaRules
from openkeye.apps.http_api.metrics import Metrics, RequestCount
from openkeye.inputs.processor import Processor

if TYPE_CHECKING:
    from openkeye.engine.answering import AnsweringService

WEB_DIR = Path(__file__).parent / "web"
SAMPLE_CLIP = Path(__file__).parents[2] / "media" / "demo.mp4"
# what the page offers to whoever has no video at hand

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_application(
    service: "AnsweringService",
    processor: Processor,
    model_name: str,
    rules: MediaRules,
    limits: ServerLimits,
    keys: list[bytes] | None = None,
) -> ASGIApp:
    """The ASGI application over a service that has been started.

    Args:
        model_name: what clients call the model.
        keys: API keys of which one is asked for; None asks for none.
    """
    metrics = Metrics(service)
    model = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "openkeye",
        "max_body_bytes": limits.max_body_bytes,
        # (for the page, which says before it sends that a video is too large)
    }

    async def page(request: Request) -> Response:
        return FileResponse(WEB_DIR / "index.html", headers=PAGE_HEADERS)

    async def sample(request: Request) -> Response:
        return FileResponse(SAMPLE_CLIP, media_type="video/mp4")

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model_name:
            raise ApiError(404, f"no such model; this server has {model_name}", "model", "model_not_found")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        if not service.is_alive:
            raise ApiError(503, ENGINE_IS_AWAY)
        return JSONResponse({"status": "ok"})

    async def figures(request: Request) -> Response:
        return Response(await run_sync(metrics.text), headers={"Content-Type": CONTENT_TYPE_LATEST})

    chat = ChatEndpoint(service, processor, model_name, rules, limits, metrics)
    routes = [
        Route("/", page),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/metrics", figures),
        Route("/web/demo.mp4", sample),
        Mount("/web", StaticFiles(directory=WEB_DIR)),
    ]
    handlers = {ApiError: respond_api_error, HTTPException: respond_http_error, Exception: respond_crash}
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    if keys is not None:
        app = KeyCheck(app, keys)
    return RequestCount(app, metrics, frozenset(route.path for route in routes if isinstance(route, Route)))
