"""`openkeye chat VIDEO`: several questions about one video, which is decoded and encoded once."""

import argparse
from pathlib import Path

from openkeye.apps.model_options import add_model_options, add_sampling_options, add_video_options, engine_from, sampling_from

SUMMARY = "ask several questions about one video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file")
    add_model_options(parser)
    add_video_options(parser)
    add_sampling_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """A question a line from standard input, until it ends (Ctrl-D)."""
    import sys

    from openkeye.apps.stage_progress import StageProgress
    from openkeye.inputs.video_scan import scan_video

    # A file that is no video is told before the checkpoint is loaded.
    scan_video(Path(arguments.video))
    sampling = sampling_from(arguments)
    engine = engine_from(arguments)
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
    is_person = sys.stdin.isatty()
    if is_person:
        print(f"{len(conversation.frames.times_seconds)} frames read. Ask away; Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_person:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if line.strip():
            conversation.ask(line.strip(), sampling=sampling, on_text=lambda piece: print(piece, end="", flush=True))
            print()
