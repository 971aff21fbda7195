"""`openkeye budget`: frames, size and tokens that a video would get, without the video."""

import argparse
import json

SUMMARY = "print frames, size and tokens for a video of a given shape and length"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--height", type=int, required=True, help="of the video, in pixels")
    parser.add_argument("--width", type=int, required=True, help="of the video, in pixels")
    parser.add_argument("--frames", type=int, required=True, help="number of frames in the file")
    parser.add_argument("--fps", type=float, required=True, help="frames a second of the file")
    parser.add_argument("--sample-fps", type=float, help="frames a second to take (default: what the checkpoint says)")
    parser.add_argument("--videos", type=int, default=1, help="videos of one request, which share the budget (default: 1)")
    parser.add_argument("--adaptive", choices=("paper", "release"), help="smaller budgets for shorter videos, by this table")
    parser.add_argument("--model", help="checkpoint whose limits count (default: the published 30B limits)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns 0."""
    from openkeye.inputs.processor import load_limits
    from openkeye.inputs.sampling import VideoLimits, plan_video

    limits = load_limits(arguments.model)[1] if arguments.model else VideoLimits()
    limits = limits.changed(fps=arguments.sample_fps, adaptive=arguments.adaptive)
    plan = plan_video(arguments.height, arguments.width, arguments.frames, arguments.fps, limits, arguments.videos)
    shown = {
        "num_frames": plan.num_frames,
        "height": plan.height,
        "width": plan.width,
        "tokens_per_frame": plan.tokens_per_frame,
        "tokens": plan.tokens,
        "budget": plan.budget,
        "seconds_between_frames": round(plan.seconds_between_frames, 6),
    }
    if arguments.json:
        print(json.dumps(shown))
        return 0
    for name, value in shown.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        print(f"{name.replace('_', ' '):24}{text:>12}")
    return 0
