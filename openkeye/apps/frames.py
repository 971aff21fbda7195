"""`openkeye frames VIDEO --out DIR`: the frames that the model would see, as PNG files with their times."""

import argparse
import json
import sys
from pathlib import Path

SUMMARY = "write the sampled frames of a video as PNG, each with its time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("video", help="a video file (mp4, mkv, webm, avi, ts, gif, ...)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files (made if missing)")
    parser.add_argument("--fps", type=float, help="frames a second (default: what the checkpoint says)")
    parser.add_argument("--start", type=float, metavar="S", help="begin at this second")
    parser.add_argument("--end", type=float, metavar="S", help="end at this second")
    parser.add_argument(
        "--size", choices=("original", "model"), default="original", help="as decoded (default), or as the model sees them"
    )
    parser.add_argument("--model", default="openkeye-tiny", help="checkpoint whose budget counts (default: openkeye-tiny)")
    parser.add_argument("--json", action="store_true", help='print [{"time_seconds", "file"}, ...] and nothing else')


def run(arguments: argparse.Namespace) -> int:
    """Write the files; returns 0."""
    import PIL.Image
    from rich.console import Console
    from rich.progress import track

    from openkeye.common.checks import InputError, writing_to
    from openkeye.inputs.processor import load_limits
    from openkeye.inputs.video import DecodeHealth, iterate_frames, request_video
    from openkeye.inputs.video_scan import scan_video

    _, limits = load_limits(arguments.model)
    scan = scan_video(Path(arguments.video))
    request = request_video(scan, limits.changed(fps=arguments.fps), 1, arguments.start, arguments.end)
    folder = Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder ({error.strerror}); choose another --out") from error
    is_original = arguments.size == "original"
    height, width = (scan.height, scan.width) if is_original else (request.plan.height, request.plan.width)
    health = DecodeHealth()
    pictures = track(
        iterate_frames(request, height, width, health),
        description="frames",
        total=len(request.frame_numbers),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    listed = []
    for number, (picture, seconds) in enumerate(pictures):
        file = folder / f"{number:05d}_{seconds:09.3f}s.png"
        with writing_to(folder):
            PIL.Image.fromarray(picture).save(file, compress_level=1)
        listed.append({"time_seconds": seconds, "file": str(file)})
    if not listed:
        raise InputError(f"{scan.source}: none of the sampled frames can be decoded; the file is damaged")
    for note in [*scan.notes, *health.notes(len(request.frame_numbers) - len(listed))]:
        print(f"note: {scan.source}: {note}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(listed, indent=1))
    else:
        print(f"{len(listed)} frames of {width}x{height} pixels from {scan.source} ({scan.duration_seconds:.1f} s)")
        for entry in listed:
            print(f"{entry['time_seconds']:10.3f} s  {entry['file']}")
    return 0
