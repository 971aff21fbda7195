"""`openkeye chat [VIDEO]`: several questions about one video, which is decoded and encoded once; or a talk without one."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openkeye.apps.model_options import add_model_options, add_sampling_options, add_video_options, engine_from, sampling_from
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.engine.config import SamplingParameters
    from openkeye.engine.loop import Engine

SUMMARY = "ask several questions about one video, or talk without one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", nargs="?", help="a video file; without one each line continues a talk (text models)")
    add_model_options(parser)
    add_video_options(parser)
    add_sampling_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """A question a line from standard input, until it ends (Ctrl-D)."""
    import sys

    from openkeye.inputs.video_scan import scan_video

    # A file that is no video is told before the checkpoint is loaded.
    if arguments.video is not None:
        scan_video(Path(arguments.video))
    elif any(getattr(arguments, name) is not None for name in ("fps", "start", "end")):
        raise InputError("--fps, --start and --end are about a video; give one")
    sampling = sampling_from(arguments)
    engine = engine_from(arguments)
    is_person = sys.stdin.isatty()
    answer = _talk(engine, sampling) if arguments.video is None else _about_video(arguments, engine, sampling, is_person)
    if is_person:
        print("Ask away; Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_person:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if line.strip():
            answer(line.strip())
            print()


def _about_video(
    arguments: argparse.Namespace, engine: "Engine", sampling: "SamplingParameters", is_person: bool
) -> Callable[[str], None]:
    """What answers a question about the video, each for itself."""
    import sys

    from openkeye.apps.stage_progress import StageProgress

    with StageProgress(is_shown=True) as progress:
        conversation = engine.open(
            arguments.video,
            fps=arguments.fps,
            start_seconds=arguments.start,
            end_seconds=arguments.end,
            total_tokens=arguments.total_tokens,
            on_progress=progress,
        )
    for note in conversation.frames.notes:
        print(f"note: {note}", file=sys.stderr)
    if is_person:
        print(f"{len(conversation.frames.times_seconds)} frames read.", file=sys.stderr)

    def answer(question: str) -> None:
        conversation.ask(question, sampling=sampling, on_text=_print_piece)

    return answer


def _talk(engine: "Engine", sampling: "SamplingParameters") -> Callable[[str], None]:
    """What continues a talk: every line is read with all that was said before it."""
    messages: list[dict[str, str]] = []

    def answer(line: str) -> None:
        turn = {"role": "user", "content": line}
        said = engine.generate([*messages, turn], sampling=sampling, on_text=_print_piece).text
        messages.extend([turn, {"role": "assistant", "content": said}])

    return answer


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
