"""Recipe `scene-captions`: dense captions scene by scene with their times, closed by an overview (report, 3.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import Captioner, ask_captioner
from openkeye.data.makers.interleaved_segments import part_between
from openkeye.data.makers.made_sample import MadeSample, assistant, job_rng, pick, text_part, user, video_part
from openkeye.data.makers.media_folder import VIDEO_ENDINGS, find_media
from openkeye.data.makers.scene_cuts import CutDetector, find_cuts, scenes_between
from openkeye.frameforge.questions import say_spans
from openkeye.inputs.video_scan import scan_video

SCENE_PROMPT = (
    "This is one scene of a longer video. Describe it in detail in one paragraph: place, people and things, what they do and "
    "in which order, how the camera moves, and any text on screen. Say only what can be seen."
)
OVERVIEW_PROMPT = (
    "These are descriptions of the scenes of one video, in order:\n\n{scenes}\n\nWrite one paragraph that tells what the whole "
    "video is about and how it goes. Use only what the descriptions say."
)
PROMPTS = (
    "Describe the video scene by scene with the times of each, then give an overview.",
    "Caption every scene of this video with its start and end, and close with a summary of the whole.",
    "Which scenes does the video have? Describe each with its times, and say at the end what the video is about.",
    "Write a dense caption of the video: all scenes with their times, then an overview.",
)


@dataclass(frozen=True)
class SceneCaptions:
    """One sample a video."""

    videos: Path
    captioner: Captioner
    seed: int = 0
    min_scene_seconds: float = 1.0
    max_scene_seconds: float = 60.0
    detector: CutDetector = field(default_factory=CutDetector)

    name = "scene-captions"

    def __post_init__(self) -> None:
        if not 0.0 < self.min_scene_seconds < self.max_scene_seconds:
            raise InputError(
                f"scenes of {self.min_scene_seconds:g} to {self.max_scene_seconds:g} s; give a range above 0, the smaller first"
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        names = ("seed", "min_scene_seconds", "max_scene_seconds")
        return {name: getattr(self, name) for name in names} | asdict(self.detector) | {"captioner": self.captioner.name}

    def jobs(self) -> Sequence[str]:
        """One for each video."""
        return find_media(self.videos, VIDEO_ENDINGS)

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        path = self.videos / job
        scan = scan_video(path)
        duration = scan.duration_seconds
        cuts = find_cuts(scan, self.detector)
        scenes = scenes_between(cuts, duration, self.min_scene_seconds, self.max_scene_seconds)
        captions = [
            ask_captioner(self.captioner, [user(part_between(path, start, end, duration), text_part(SCENE_PROMPT))], job)
            for start, end in scenes
        ]
        paragraphs = [f"{say_spans([scene])} {caption}" for scene, caption in zip(scenes, captions, strict=True)]
        prompt = OVERVIEW_PROMPT.format(scenes="\n".join(paragraphs))
        overview = ask_captioner(self.captioner, [user(text_part(prompt))], job)
        question = pick(job_rng(self.seed, job), PROMPTS)
        truth = {
            "scenes": [
                {"start": round(start, 3), "end": round(end, 3), "caption": caption}
                for (start, end), caption in zip(scenes, captions, strict=True)
            ],
            "overview": overview,
        }
        answer = assistant("\n".join([*paragraphs, f"Overview: {overview}"]))
        return [MadeSample([user(video_part(path), text_part(question)), answer], "scene_captions", truth)]
