"""`Answer`: what the engine says, with what a person or a program may want to know about it."""

from dataclasses import dataclass, field
from typing import Any

from openkeye.engine.video_evidence import VideoEvidence


@dataclass(frozen=True)
class Answer:
    """The answer to one question."""

    text: str
    intervals_seconds: list[tuple[float, float]]
    # times of spans in the text, widened by half the spacing of the sampled frames (`inputs.intervals`)
    num_prompt_tokens: int
    num_cached_tokens: int
    # of the prompt, taken from the prefix cache
    num_generated_tokens: int
    num_frames: int
    frame_spacing_seconds: float
    stage_seconds: dict[str, float]
    # decode_video, encode_vision, prefill, generate; the first overlaps the others
    finish_reason: str
    # "stop" or "length"; from a service also "cancelled" or "deadline"
    notes: list[str] = field(default_factory=list)
    evidence: list[VideoEvidence] | None = None
    # what the answer rests on, video by video, where that was asked for

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        seconds = {stage: round(value, 3) for stage, value in self.stage_seconds.items()}
        intervals = [[round(first, 3), round(last, 3)] for first, last in self.intervals_seconds]
        evidence = None if self.evidence is None else [video.to_dict() for video in self.evidence]
        return vars(self) | {"intervals_seconds": intervals, "stage_seconds": seconds, "evidence": evidence}
