"""Options that the answering commands share, and the engine they describe."""

import argparse
from typing import TYPE_CHECKING

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.engine.config import SamplingParameters
    from openkeye.engine.loop import Engine

GPU_CHUNK = 8192
# prompt tokens of a batch: fewer cost a GPU more for each


def add_model_options(parser: argparse.ArgumentParser, attention: tuple[str, ...] = ("sparse", "dense")) -> None:
    """Which checkpoint, where, with which attention; the command makes an engine, which may be one of several ranks."""
    parser.set_defaults(has_engine=True)
    parser.add_argument("--model", default="openkeye-tiny", metavar="DIR", help="openkeye-tiny or a checkpoint folder")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--attention", choices=attention, default="sparse", help="sparse as trained, or dense")
    parser.add_argument(
        "--dense-up-to",
        type=int,
        default=None,
        metavar="N",
        help="of sparse attention: the first N tokens of a sequence see all keys before them (default: the model's top-k)",
    )
    add_engine_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What the engine keeps in which format, and how much of it."""
    formats = ("auto", "e4m3")
    parser.add_argument(
        "--experts", choices=formats, default="auto", help="e4m3 halves the experts' weights (default: as stored)"
    )
    parser.add_argument("--kv-cache", choices=formats, default="auto", help="e4m3 halves keys and values (default: the dtype)")
    parser.add_argument(
        "--cache-tokens",
        type=int,
        default=None,
        metavar="N",
        help="tokens that the caches hold (default: on a GPU as many as fit, on a CPU 65,536)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        default=None,
        metavar="N",
        help="prompt tokens of a batch (default: 8,192 on a GPU, 2,048 on a CPU); fewer let answers under way go on sooner",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="answers do not depend, to the last bit, on what runs beside them; slower",
    )


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Which part of the video, how densely."""
    parser.add_argument("--fps", type=float, default=None, help="frames to look at per second (default: the checkpoint's, 2)")
    parser.add_argument(
        "--total-tokens",
        type=int,
        default=None,
        metavar="N",
        help="the video's budget; where it is too small for every frame, fewer are taken (default: the checkpoint's)",
    )
    parser.add_argument("--start", type=float, default=None, metavar="S", help="look from this second on")
    parser.add_argument("--end", type=float, default=None, metavar="S", help="look until this second")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the answer's words are chosen."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest word")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest words that hold this much probability")
    parser.add_argument("--top-k", type=int, default=0, help="keep this many words (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens")


def sampling_from(arguments: argparse.Namespace) -> "SamplingParameters":
    """The sampling options as a record; InputError where they make no sense."""
    from openkeye.engine.config import SamplingParameters

    try:
        return SamplingParameters(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed, arguments.max_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None


def engine_from(arguments: argparse.Namespace, attention: str | None = None) -> "Engine":
    """The engine that the model options describe; InputError for a device that is not there and options that make no sense."""
    import torch

    from openkeye.engine.config import EngineConfig
    from openkeye.engine.loop import Engine

    if arguments.dense_up_to is not None and arguments.dense_up_to < 0:
        raise InputError(f"--dense-up-to is {arguments.dense_up_to}; give a number of tokens from 0 on")
    checked_device(arguments.device)
    is_gpu = torch.cuda.is_available() if arguments.device is None else arguments.device.startswith("cuda")
    default_chunk = GPU_CHUNK if is_gpu else EngineConfig.prefill_chunk_tokens
    try:
        config = EngineConfig(
            dense_up_to=arguments.dense_up_to,
            experts=arguments.experts,
            kv_cache=arguments.kv_cache,
            cache_tokens=arguments.cache_tokens,
            is_batch_invariant=arguments.batch_invariant,
            prefill_chunk_tokens=default_chunk if arguments.prefill_chunk is None else arguments.prefill_chunk,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return Engine(arguments.model, arguments.device, attention=attention or arguments.attention, config=config)


def checked_device(name: str | None) -> str | None:
    """A device's name as it was given; InputError where it is unknown or not there."""
    import torch

    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise InputError(f"device {name!r} is unknown; give cpu or cuda") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda was asked for, but PyTorch sees no CUDA GPU; give --device cpu")
    return name
