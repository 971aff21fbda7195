"""Whether a checkpoint has room for a video at a rate of frames, told before anything is filmed or decoded."""

from typing import TYPE_CHECKING

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine
    from openkeye.inputs.sampling import VideoLimits

ANSWER_TOKENS = 320
# and the question: what the engine keeps free for an answer by default, and 64


def whole_video_limits(engine: "Engine", seconds: float, fps: float | None, total_tokens: int | None) -> "VideoLimits":
    """The checkpoint's limits with a budget for every frame at the rate, whatever the checkpoint's own; or the one given."""
    limits = engine.processor.video_limits.changed(fps=fps)
    least = int(seconds * limits.fps + 1) * limits.min_tokens_per_frame
    return limits.changed(total_tokens=total_tokens or max(limits.total_tokens, least))


def check_room(engine: "Engine", seconds: float, limits: "VideoLimits", side: int, file_fps: float) -> int:
    """Tokens that a square video of so many pixels and seconds takes, its question and answer aside.

    Raises:
        InputError: more than the checkpoint's context or the engine's cache holds.
    """
    from openkeye.inputs.sampling import plan_video

    processor = engine.processor
    plan = plan_video(side, side, round(seconds * file_fps), file_fps, limits)
    texts = (processor.encode_frame_text(float(number) / file_fps) for number in plan.frame_indices)
    num_tokens = plan.tokens + sum(len(text) for text in texts)
    cache = engine.scheduler.pool.num_pages * engine.config.page_size
    context = processor.max_tokens or num_tokens + ANSWER_TOKENS
    what = f"{plan.num_frames:,} frames of {seconds / 60:g} minutes take {num_tokens:,} tokens"
    if num_tokens + ANSWER_TOKENS > context:
        raise InputError(
            f"{what}; the context of {processor.model_dir} holds {context:,} (max_position_embeddings in config.json): "
            "give fewer frames (--fps, --total-tokens) or shorter videos"
        )
    if num_tokens + ANSWER_TOKENS > cache:
        mend = -(-(num_tokens + ANSWER_TOKENS) // engine.config.page_size) * engine.config.page_size
        raise InputError(f"{what}; the engine's cache holds {cache:,}: give --cache-tokens {mend} or more, or fewer frames")
    return num_tokens
