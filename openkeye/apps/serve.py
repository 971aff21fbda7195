"""`openkeye serve`: the model behind an HTTP API in OpenAI's shape, with metrics and a page."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openkeye.apps.model_options import add_model_options, engine_from
from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks

if TYPE_CHECKING:
    import socket

    from openkeye.apps.http_api.limits import ServerLimits
    from openkeye.apps.http_api.media_rules import MediaRules
    from openkeye.engine.service import EngineService
    from openkeye.engine.worker_service import WorkerService

SUMMARY = "serve the model over HTTP: an OpenAI-compatible API, metrics and a page"

LEAST_OPTIONS = {
    "port": 0,
    "max_body_mib": 1,
    "max_concurrent": 1,
    "max_queue": 1,
    "max_answer_tokens": 1,
    "default_answer_tokens": 1,
    "max_remote_mib": 1,
    "grace_seconds": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (0: any free one, which is printed)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="ask for one of these keys, one a line")
    parser.add_argument("--media-dir", type=Path, metavar="DIR", help="requests may name files below this folder")
    parser.add_argument("--allow-remote-media", action="store_true", help="requests may name http(s) addresses, public ones")
    parser.add_argument("--max-remote-mib", type=int, default=256, metavar="N", help="largest file to fetch (default: 256)")
    parser.add_argument("--max-body-mib", type=int, default=64, metavar="N", help="largest request (default: 64)")
    parser.add_argument("--max-concurrent", type=int, default=64, metavar="N", help="requests at once (default: 64)")
    parser.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="requests that the engine lets wait (default: 256)"
    )
    parser.add_argument("--max-answer-tokens", type=int, default=4096, metavar="N", help="longest answer (default: 4096)")
    parser.add_argument(
        "--default-answer-tokens", type=int, default=512, metavar="N", help="where a request gives no max_tokens (default: 512)"
    )
    parser.add_argument("--deadline", type=float, default=600.0, metavar="S", help="longest a request may take (default: 600)")
    parser.add_argument("--grace-seconds", type=int, default=5, metavar="S", help="to finish answers when stopped (default: 5)")
    parser.add_argument("--log-requests", action="store_true", help="a line on standard error for every request")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns 0, or 1 where the engine died and cannot be started any more.

    The engine runs in a process of its own (`WorkerService`); this one answers HTTP, whatever becomes of that. Over several
    ranks it runs here: none of them outlives the others, and only torchrun can start them all again.

    Raises:
        InputError: an option makes no sense, a file or the model is missing, or the port is taken.
    """
    from openkeye.apps.http_api.application import make_application
    from openkeye.apps.http_api.keys import read_keys
    from openkeye.apps.http_api.server import listen, run_server
    from openkeye.inputs.processor import Processor

    # What is quick to find out is told before the model is loaded.
    limits, rules = _limits(arguments), _media_rules(arguments)
    keys = None if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    listener = listen(arguments.host, arguments.port)
    processor = Processor.load(arguments.model)
    name = arguments.model_name or processor.model_dir.resolve().name
    service = _service(arguments)
    try:
        service.start()
        application = make_application(service, processor, name, rules, limits, keys)
        _tell(arguments, name, listener)
        run_server(application, listener, arguments.grace_seconds, service, arguments.log_requests)
    finally:
        service.stop()
    return int(service.has_given_up)


def _service(arguments: argparse.Namespace) -> "EngineService | WorkerService":
    """The engine that answers, not started yet."""
    from openkeye.engine.worker_service import WorkerService

    if num_ranks() > 1:
        # Only here: it brings torch, which this process does without where a worker has the model.
        from openkeye.engine.service import EngineService

        return EngineService(engine_from(arguments), max_queue=arguments.max_queue)
    return WorkerService(partial(engine_from, arguments), max_queue=arguments.max_queue)


def _limits(arguments: argparse.Namespace) -> "ServerLimits":
    from openkeye.apps.http_api.limits import ServerLimits

    for option, least in LEAST_OPTIONS.items():
        if getattr(arguments, option) < least:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(arguments, option)}; give a number from {least} on")
    if arguments.port > 65535:
        # (the system would take it for another one)
        raise InputError(f"--port is {arguments.port}; give 0 to 65535")
    if not 0 < arguments.deadline < float("inf"):
        raise InputError(f"--deadline is {arguments.deadline}; give seconds above 0")
    return ServerLimits(
        max_body_bytes=arguments.max_body_mib << 20,
        max_concurrent=arguments.max_concurrent,
        max_answer_tokens=arguments.max_answer_tokens,
        default_answer_tokens=arguments.default_answer_tokens,
        deadline_seconds=arguments.deadline,
    )


def _media_rules(arguments: argparse.Namespace) -> "MediaRules":
    from openkeye.apps.http_api.media_rules import MediaRules
    from openkeye.apps.http_api.remote_media import RemoteLimits

    if arguments.media_dir is not None and not arguments.media_dir.is_dir():
        raise InputError(f"{arguments.media_dir}: no such folder; give --media-dir the folder whose files may be asked about")
    remote = RemoteLimits(max_bytes=arguments.max_remote_mib << 20) if arguments.allow_remote_media else None
    return MediaRules(arguments.media_dir, remote)


def _tell(arguments: argparse.Namespace, name: str, listener: "socket.socket") -> None:
    """Say where the server is, and who may come in."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{name} at http://{shown}:{port} (page), http://{shown}:{port}/v1 (API); Ctrl-C ends", file=sys.stderr, flush=True)
    if arguments.api_key_file is None and host not in ("127.0.0.1", "::1"):
        print(f"note: without --api-key-file everyone who reaches {shown}:{port} may ask", file=sys.stderr, flush=True)
