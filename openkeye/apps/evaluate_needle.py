"""`openkeye evaluate needle`: is a thing shown for 3-4 s found, and a word read, at any length and depth of a video?"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from openkeye.apps.model_options import add_model_options, engine_from
from openkeye.apps.video_room import check_room, whole_video_limits
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine
    from openkeye.frameforge.needles import Needle
    from openkeye.inputs.sampling import VideoLimits
    from openkeye.inputs.video import Frames

FOUND_TIOU = 0.5
FRAMES_AT_ONCE = 256


def add_arguments(suite: argparse.ArgumentParser) -> None:
    """Options of the suite."""
    suite.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 5, 10, 20], metavar="MIN", help="minutes of video")
    suite.add_argument(
        "--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], metavar="SHARE", help="where the needle lies"
    )
    suite.add_argument("--num", type=int, default=20, help="videos of each length and depth")
    suite.add_argument("--seed", type=int, default=0, help="of the videos; training never saw any of them")
    suite.add_argument("--fps", type=float, default=2.0, help="frames per second, drawn and looked at")
    suite.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(suite, attention=("sparse", "dense", "both"))


def run(arguments: argparse.Namespace) -> int:
    """Draw, ask, score, print."""
    from rich.console import Console
    from rich.progress import track

    from openkeye.frameforge.writer import needle_of

    _check(arguments)
    modes = ("sparse", "dense") if arguments.attention == "both" else (arguments.attention,)
    engines = {mode: engine_from(arguments, mode) for mode in modes}
    engine = engines[modes[0]]
    limits = {length: whole_video_limits(engine, 60 * length, arguments.fps, None) for length in arguments.lengths}
    for length in sorted(arguments.lengths):
        # Before the first video: a length that does not fit is told at once.
        check_room(engine, 60 * length, limits[length], 112, arguments.fps)
    cells = [(length, depth) for length in sorted(arguments.lengths) for depth in sorted(arguments.depths)]
    jobs = [(length, depth, index) for length, depth in cells for index in range(arguments.num)]
    console = Console(stderr=True)
    records = []
    for length, depth, index in track(jobs, "Asking", console=console, disable=not console.is_terminal):
        needle = needle_of(arguments.seed, index, length, depth, arguments.fps)
        frames = draw_frames(needle, limits[length], str(engine.device))
        records.append(_ask(needle, frames, engines))
    report = _report(arguments, records, modes, engine)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_table(report, modes)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.num < 1:
        raise InputError(f"--num is {arguments.num}; give at least 1")
    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; give a whole number from 0")
    if not all(0.25 <= length <= 60 for length in arguments.lengths):
        raise InputError(f"--lengths are {arguments.lengths}; give minutes from 0.25 to 60")
    if not all(0 <= depth <= 1 for depth in arguments.depths):
        raise InputError(f"--depths are {arguments.depths}; give shares of the video from 0 to 1")
    if not 1 <= arguments.fps <= 30:
        raise InputError(f"--fps is {arguments.fps}; give 1 to 30, so that a needle of 3 s is seen")


def draw_frames(needle: "Needle", limits: "VideoLimits", device: str) -> "Frames":
    """The video as the model would see it from a file, without the file: drawn on the device at the model's size."""
    import numpy as np

    from openkeye.frameforge.render import render, scene_job, split_job
    from openkeye.inputs.sampling import plan_video
    from openkeye.inputs.video import Frames

    fps = 1 / float(needle.frame_times[1])
    side = plan_video(112, 112, len(needle.frame_times), fps, limits, source="needle").height
    job = scene_job(needle.scene, needle.frame_times)
    pixels = [render(part, side, device).cpu().numpy() for part in split_job(job, FRAMES_AT_ONCE)]
    name = f"needle at {needle.depth:.0%} of {needle.minutes:g} minutes"
    return Frames(np.concatenate(pixels), needle.frame_times.tolist(), name, 60.0 * needle.minutes)


def _ask(needle: "Needle", frames: "Frames", engines: "dict[str, Engine]") -> dict[str, Any]:
    """Of one video: found and read by each mode (0 or 1), and its prompt's tokens."""
    from openkeye.frameforge.scoring import score, temporal_iou

    when, which = needle.questions
    record: dict[str, Any] = {"minutes": needle.minutes, "depth": needle.depth}
    for mode, engine in engines.items():
        found, read = engine.ask_many(frames, [when.text, which.text])
        tiou = temporal_iou(found.intervals_seconds, when.intervals)
        word = score(which, read.text, read.intervals_seconds, None, read.frame_spacing_seconds)
        record |= {"tokens": found.num_prompt_tokens, f"{mode}_found": int(tiou >= FOUND_TIOU), f"{mode}_read": int(word)}
    return record


def _report(
    arguments: argparse.Namespace, records: list[dict[str, Any]], modes: tuple[str, ...], engine: "Engine"
) -> dict[str, Any]:
    top_k = engine.runner.model.config.indexer.top_k
    lengths = sorted({record["minutes"] for record in records})
    depths = sorted({record["depth"] for record in records})
    rows = []
    for length in lengths:
        for depth in (None, *depths):
            mine = [r for r in records if r["minutes"] == length and depth in (None, r["depth"])]
            tokens = sum(r["tokens"] for r in mine) / len(mine)
            row = {"minutes": length, "depth": depth, "num": len(mine), "tokens": round(tokens), "times_k": tokens / top_k}
            for mode in modes:
                for task in ("found", "read"):
                    right = sum(r[f"{mode}_{task}"] for r in mine)
                    row[f"{mode}_{task}"] = right / len(mine)
                    row[f"{mode}_{task}_interval"] = wilson_interval(right, len(mine))
            rows.append(row)
    names = ("model", "num", "seed", "fps", "attention", "dense_up_to")
    settings = {name: getattr(arguments, name) for name in names} | {"top_k": top_k, "found_tiou": FOUND_TIOU}
    return {"rows": rows, "settings": settings}


def wilson_interval(num_right: int, num: int) -> list[float]:
    """95% interval of a share (Wilson 1927): never outside 0..1, and wide where few were asked."""
    z = 1.959964
    share = num_right / num
    middle = share + z * z / (2 * num)
    spread = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return [max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)]


def _print_table(report: dict[str, Any], modes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = report["settings"]
    title = f"A needle in a video: {settings['num']} videos a row, seed {settings['seed']}, k = {settings['top_k']}"
    table = Table(title=title)
    for name in ["minutes", "tokens", "x k", "depth", *[f"{mode}, {task}" for mode in modes for task in ("found", "read")]]:
        table.add_column(name)
    for row in report["rows"]:
        is_mean = row["depth"] is None
        cells = [f"{row['minutes']:g}", f"{row['tokens']:,}", f"{row['times_k']:.1f}"] if is_mean else ["", "", ""]
        cells.append("all" if is_mean else f"{row['depth']:g}")
        for mode in modes:
            for task in ("found", "read"):
                low, high = row[f"{mode}_{task}_interval"]
                cells.append(f"{row[f'{mode}_{task}']:.2f} ({low:.2f} - {high:.2f})")
        table.add_row(*cells, style="bold" if is_mean else None)
    Console().print(table)
