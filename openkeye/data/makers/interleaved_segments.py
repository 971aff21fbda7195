"""Recipe `interleaved-segments`: a video in pieces of 15 s, each followed by its caption (report, 3.2, stage 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import Captioner, ask_captioner
from openkeye.data.makers.made_sample import MadeSample, Message, assistant, job_rng, pick, text_part, user, video_part
from openkeye.data.makers.media_folder import VIDEO_ENDINGS, find_media
from openkeye.inputs.video_scan import scan_video

BEFORE_NEXT_SECONDS = 0.001
# Both ends of a part are shown: a frame at the very boundary belongs to the piece that it begins.

CAPTION_PROMPT = (
    "Describe this part of a video in one paragraph: who and what is seen, what happens in which order, and any text on "
    "screen. Say only what can be seen."
)
PROMPTS = (
    "Describe each part of the video as it is shown.",
    "The video comes in parts. Say after each what it shows.",
    "Caption the video part by part.",
    "Tell what happens in every part of this video.",
)


def cut_into_segments(duration_seconds: float, segment_seconds: float) -> list[tuple[float, float]]:
    """(start, end) of pieces that cover a video; a rest shorter than a third of a piece lengthens the last one."""
    count = max(1, int(duration_seconds / segment_seconds + 2 / 3))
    edges = [number * segment_seconds for number in range(count)]
    return list(zip(edges, [*edges[1:], duration_seconds], strict=True))


def part_between(path: Path, start: float, end: float, duration_seconds: float) -> Message:
    """The frames of a video from `start` to before `end`, as a part of a message; to the last frame where that is the end."""
    return video_part(path, start, None if end >= duration_seconds else round(end - BEFORE_NEXT_SECONDS, 3))


@dataclass(frozen=True)
class InterleavedSegments:
    """One sample a video (more for long ones): the user shows a piece, the assistant says what it shows, and so on."""

    videos: Path
    captioner: Captioner
    seed: int = 0
    segment_seconds: float = 15.0
    max_segments: int = 40
    # of one sample; a longer video becomes several

    name = "interleaved-segments"

    def __post_init__(self) -> None:
        if not 1.0 <= self.segment_seconds <= 3600.0:
            raise InputError(f"segments of {self.segment_seconds:g} s; give 1 to 3600")
        if self.max_segments < 1:
            raise InputError(f"{self.max_segments} segments a sample; give 1 or more")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        names = ("seed", "segment_seconds", "max_segments")
        return {name: getattr(self, name) for name in names} | {"captioner": self.captioner.name}

    def jobs(self) -> Sequence[str]:
        """One for each video."""
        return find_media(self.videos, VIDEO_ENDINGS)

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        path = self.videos / job
        duration = scan_video(path).duration_seconds
        segments = cut_into_segments(duration, self.segment_seconds)
        rng = job_rng(self.seed, job)
        samples = []
        for first in range(0, len(segments), self.max_segments):
            messages: list[Message] = []
            truth = []
            for number, (start, end) in enumerate(segments[first : first + self.max_segments]):
                part = part_between(path, start, end, duration)
                caption = ask_captioner(self.captioner, [user(part, text_part(CAPTION_PROMPT))], job)
                prompt = [] if number else [text_part(pick(rng, PROMPTS))]
                messages += [user(part, *prompt), assistant(caption)]
                truth.append({"start": start, "end": round(end, 3), "caption": caption})
            samples.append(MadeSample(messages, "interleaved_captions", {"segments": truth}))
        return samples
