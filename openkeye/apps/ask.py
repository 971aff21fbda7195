"""`openkeye ask [VIDEO] QUESTION`: one question, answered as it is generated."""

import argparse
import json
from pathlib import Path
from typing import Any

from openkeye.apps.model_options import add_model_options, add_sampling_options, add_video_options, engine_from, sampling_from
from openkeye.common.checks import InputError

SUMMARY = "answer a question about a video, with times; or a question alone"
NUM_MOMENTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", nargs="?", help="a video file; without one the question is asked alone (text models)")
    parser.add_argument("question", help='for example "When does the red circle appear?"')
    add_model_options(parser)
    add_video_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--evidence", action="store_true", help="tell which moments of the video the answer rests on")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, intervals, token counts, times")


def run(arguments: argparse.Namespace) -> int:
    """Stream the answer to standard output; notes and progress go to standard error."""
    import sys

    from openkeye.apps.stage_progress import StageProgress
    from openkeye.inputs.video_scan import scan_video

    # A file that is no video is told before the checkpoint is loaded.
    scan = None if arguments.video is None else scan_video(Path(arguments.video))
    if scan is None and (arguments.evidence or any(getattr(arguments, name) is not None for name in ("fps", "start", "end"))):
        raise InputError("--fps, --start, --end and --evidence are about a video; give one before the question")
    sampling = sampling_from(arguments)
    engine = engine_from(arguments)

    def stream(piece: str) -> None:
        progress.stop()
        print(piece, end="", flush=True)

    with StageProgress(is_shown=not arguments.json) as progress:
        options: dict[str, Any] = {"sampling": sampling, "on_text": None if arguments.json else stream, "on_progress": progress}
        if scan is None:
            answer = engine.generate(question_alone(arguments.question), **options)
        else:
            window = {"fps": arguments.fps, "start_seconds": arguments.start, "end_seconds": arguments.end}
            options |= {"total_tokens": arguments.total_tokens, "evidence": arguments.evidence}
            answer = engine.ask(scan, arguments.question, **window, **options)
    if arguments.json:
        print(json.dumps(answer.to_dict()))
        return 0
    print()
    if answer.evidence is not None:
        heaviest = sorted(answer.evidence[0].moments, key=lambda moment: moment.weight, reverse=True)[:NUM_MOMENTS]
        print(f"Most attention: {', '.join(f'{moment.seconds:.1f} s ({moment.weight:.1%})' for moment in heaviest)}.")
    for note in answer.notes:
        print(f"note: {note}", file=sys.stderr)
    if answer.finish_reason == "length":
        print(f"note: the answer was cut at {answer.num_generated_tokens} tokens; give --max-tokens", file=sys.stderr)
    return 0


def question_alone(question: str) -> list[dict[str, str]]:
    """A chat of one question.

    Raises:
        InputError: nothing is asked.
    """
    if not question.strip():
        raise InputError("the question is empty; ask something")
    return [{"role": "user", "content": question}]
