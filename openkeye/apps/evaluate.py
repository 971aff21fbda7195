"""`openkeye evaluate frameforge`: asks every question of unseen clips through the path of `ask` and scores the answers.

`openkeye evaluate needle` is in `evaluate_needle`, `openkeye evaluate task` in `evaluate_task`.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from openkeye.apps import evaluate_needle, evaluate_task
from openkeye.apps.evaluate_task import add_task_suite
from openkeye.apps.evaluate_text import add_text_suite
from openkeye.apps.evaluate_text import run as run_text
from openkeye.apps.intervals import interval
from openkeye.apps.model_options import add_model_options, engine_from
from openkeye.apps.video_room import check_room, whole_video_limits
from openkeye.common.checks import InputError, writing_to

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openkeye.engine.loop import Engine
    from openkeye.frameforge.writer import ClipFile
    from openkeye.inputs.sampling import VideoLimits

SUMMARY = "score a checkpoint on synthetic videos with known answers, or a text model on real text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    suite = suites.add_parser("frameforge", help="six rule-checked tasks on unseen clips")
    suite.add_argument("--num", type=int, default=400, help="number of clips")
    suite.add_argument("--seed", type=int, default=0, help="of the clips; training never saw any of them")
    suite.add_argument("--tier", choices=("standard", "long", "hour"), default="standard", help="8-30 s, 1-5 min, or an hour")
    suite.add_argument("--fps", type=float, default=2.0, help="sampled frames per second")
    suite.add_argument(
        "--total-tokens",
        type=int,
        default=None,
        metavar="N",
        help="a video's budget without its times, 16 a frame of openkeye-tiny; fewer take fewer frames (default: the "
        "checkpoint's; of the hour tier, every frame's)",
    )
    suite.add_argument("--data", default=None, metavar="DIR", help="clips made earlier by `openkeye frameforge make`")
    suite.add_argument("--keep", default=None, metavar="DIR", help="write the clips here and keep them")
    suite.add_argument("--workers", type=int, default=None, help="processes that film clips (default: one less than the cores)")
    suite.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(suite, attention=("sparse", "dense", "both"))
    needle = suites.add_parser("needle", help="a thing shown for 3-4 s, by length and depth of the video")
    evaluate_needle.add_arguments(needle)
    add_text_suite(suites.add_parser("text", help="perplexity, the indexer's recall and needles of a text model"))
    add_task_suite(suites.add_parser("task", help="any task of post-training, by its own rewards"))


def run(arguments: argparse.Namespace) -> int:
    """Film, ask, score, print."""
    if arguments.suite == "needle":
        return evaluate_needle.run(arguments)
    if arguments.suite == "text":
        return run_text(arguments)
    if arguments.suite == "task":
        return evaluate_task.run(arguments)
    if arguments.num < 1:
        raise InputError(f"--num is {arguments.num}; give at least 1")
    modes = ("sparse", "dense") if arguments.attention == "both" else (arguments.attention,)
    engines = {mode: engine_from(arguments, mode) for mode in modes}
    limits = _limits(arguments, engines[modes[0]])
    scores = _score_clips(arguments, engines, limits)
    report = _report(arguments, scores, modes)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_table(report, modes)
    return 0


def _limits(arguments: argparse.Namespace, engine: "Engine") -> "VideoLimits":
    """How many frames a clip may take; a tier that the checkpoint has no room for is refused before it is filmed."""
    from openkeye.frameforge.writer import TIERS

    tier = TIERS[arguments.tier]
    if not tier.is_sparse:
        return engine.processor.video_limits.changed(fps=arguments.fps, total_tokens=arguments.total_tokens)
    # The checkpoint's own budget may step over an event of seconds without a word.
    limits = whole_video_limits(engine, tier.seconds[1], arguments.fps, arguments.total_tokens)
    if arguments.data is None:
        check_room(engine, tier.seconds[1], limits, tier.side, tier.fps)
    return limits


def _score_clips(arguments: argparse.Namespace, engines: "dict[str, Engine]", limits: "VideoLimits") -> list[dict[str, Any]]:
    """One record per question: task, clip, question, duration, and the score of each mode and of a perfect sampler."""
    import os
    import tempfile
    from contextlib import ExitStack, closing
    from pathlib import Path

    from rich.console import Console
    from rich.progress import track

    from openkeye.frameforge.writer import read_clips, write_clips

    with ExitStack() as stack:
        with writing_to(Path(tempfile.gettempdir())):
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
        if arguments.data is not None:
            folder = Path(arguments.data)
            if not (folder / "clips.jsonl").is_file():
                raise InputError(f"{folder} holds no clips.jsonl; make one with: openkeye frameforge make --out {folder}")
            clips: Iterable[ClipFile] = read_clips(folder)[: arguments.num]
        else:
            folder = Path(arguments.keep or scratch)
            workers = arguments.workers or max(1, (os.cpu_count() or 2) - 1)
            # Closed before the folder goes, so that no clip is written into it while it is emptied.
            writer = write_clips(folder, arguments.num, arguments.seed, arguments.tier, num_workers=workers)
            clips = stack.enter_context(closing(writer))
        console = Console(stderr=True)
        bar = track(clips, "Asking", total=arguments.num, console=console, disable=not console.is_terminal)
        return [record for number, clip in enumerate(bar) for record in _ask_clip(number, clip, engines, limits)]


def _ask_clip(number: int, clip: "ClipFile", engines: "dict[str, Engine]", limits: "VideoLimits") -> list[dict[str, Any]]:
    from openkeye.frameforge.scoring import score
    from openkeye.inputs.intervals import parse_intervals, parse_moment, widen_intervals
    from openkeye.inputs.video import read_video

    texts = [question.text for question in clip.questions]
    frames = read_video(clip.path, limits)
    answers = {mode: engine.ask_many(frames, texts) for mode, engine in engines.items()}
    records = []
    for place, question in enumerate(clip.questions):
        spacing = next(iter(answers.values()))[place].frame_spacing_seconds
        perfect = widen_intervals(parse_intervals(question.answer), spacing, 0.0, clip.duration_seconds)
        record = {
            "task": question.task,
            "clip": number,
            "question": question,
            "seconds": clip.duration_seconds,
            "num_frames": len(frames.times_seconds),
            "tokens": next(iter(answers.values()))[place].num_prompt_tokens,
            "ceiling": score(question, question.answer, perfect, parse_moment(question.answer), spacing),
        }
        for mode in engines:
            answer = answers[mode][place]
            moment = parse_moment(answer.text)
            record[mode] = score(question, answer.text, answer.intervals_seconds, moment, answer.frame_spacing_seconds)
        records.append(record)
    return records


def _report(arguments: argparse.Namespace, records: list[dict[str, Any]], modes: tuple[str, ...]) -> dict[str, Any]:
    import numpy as np

    from openkeye.frameforge.questions import TASKS
    from openkeye.frameforge.scoring import trivial_score

    report: dict[str, Any] = {}
    for task in TASKS:
        mine = [record for record in records if record["task"] == task]
        key = "mean_tiou" if task == "timestamp_localisation" else "accuracy"
        values = np.array([[record[mode] for mode in modes] for record in mine])
        clips = np.array([record["clip"] for record in mine])
        row: dict[str, Any] = {
            key: float(values[:, 0].mean()),
            "interval": interval(values[:, 0], clips),
            "trivial": trivial_score(task, [r["question"] for r in mine], [r["seconds"] for r in mine]),
            "ceiling": float(np.mean([record["ceiling"] for record in mine])),
            "num_questions": len(mine),
        }
        if len(modes) > 1:
            row["dense"] = float(values[:, 1].mean())
            row["sparse_minus_dense"] = float((values[:, 0] - values[:, 1]).mean())
        report[task] = row
    if len(modes) > 1:
        report["sparse_minus_dense"] = float(np.mean([report[task]["sparse_minus_dense"] for task in TASKS]))
    report["settings"] = {
        "model": arguments.model,
        "num_clips": len({record["clip"] for record in records}),
        "seed": arguments.seed,
        "tier": arguments.tier,
        "fps": arguments.fps,
        "mean_frames": float(np.mean([record["num_frames"] for record in records])),
        "mean_prompt_tokens": float(np.mean([record["tokens"] for record in records])),
        "attention": arguments.attention,
        "dense_up_to": arguments.dense_up_to,
    }
    return report


def _print_table(report: dict[str, Any], modes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = report["settings"]
    table = Table(title=f"FrameForge, {settings['tier']} tier: {settings['num_clips']} clips, seed {settings['seed']}")
    columns = ["task", f"{modes[0]}", "95% interval", "trivial", "ceiling", "questions"]
    for name in [*columns, *(["dense", "sparse - dense"] if len(modes) > 1 else [])]:
        table.add_column(name)
    for task, row in report.items():
        if task in ("settings", "sparse_minus_dense"):
            continue
        value = row.get("mean_tiou", row.get("accuracy"))
        cells = [task, f"{value:.3f}", "{:.3f} - {:.3f}".format(*row["interval"])]
        cells += [f"{row['trivial']:.3f}", f"{row['ceiling']:.3f}", str(row["num_questions"])]
        if len(modes) > 1:
            cells += [f"{row['dense']:.3f}", f"{row['sparse_minus_dense']:+.3f}"]
        table.add_row(*cells)
    Console().print(table)
    if len(modes) > 1:
        print(f"mean of sparse - dense over tasks: {report['sparse_minus_dense']:+.4f}")
