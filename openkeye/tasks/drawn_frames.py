"""`DrawnFrames`: a clip as the model sees it, drawn when its pixels are first asked for, on the device that computes."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from openkeye.frameforge.render import RenderJob, render, scene_job, split_job
from openkeye.frameforge.scene import Scene
from openkeye.frameforge.stream import codec_like_by_frame, damage_table
from openkeye.inputs.sampling import VideoLimits, plan_video
from openkeye.inputs.video import TIME_DIGITS, Frames

FRAMES_AT_ONCE = 256
MAX_CACHED_BYTES = 1 << 30
# an hour at 2 frames a second and 112 pixels takes a quarter of it


class PictureCache:
    """Pixels of the clips drawn last, by what they show; the clip drawn longest ago goes first."""

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_drawn = 0
        # clips that were drawn, not found
        self._pixels: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, frames: "DrawnFrames") -> np.ndarray:
        """[N, side, side, 3] uint8, not to be written to. One clip is drawn at a time, and never twice side by side."""
        key = frames.key
        with self._lock:
            if key in self._pixels:
                self._pixels.move_to_end(key)
                return self._pixels[key]
            pixels = frames.draw()
            self.num_drawn += 1
            self._pixels[key] = pixels
            while len(self._pixels) > 1 and self.num_bytes > self.max_bytes:
                self._pixels.popitem(last=False)
            return pixels

    @property
    def num_bytes(self) -> int:
        """Of all pixels held."""
        return sum(pixels.nbytes for pixels in self._pixels.values())

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._pixels.clear()


PICTURES = PictureCache()
# of this process: a group's members, and whoever learns from them, see one drawing


class DrawnFrames(Frames):
    """`Frames` without pixels until somebody asks for them. It travels between processes as its scene, in kilobytes."""

    # (its own beginning: `pixels` is no stored field here)
    def __init__(
        self,
        scene: Scene,
        times_seconds: list[float],
        side: int,
        source: str,
        duration_seconds: float,
        key: tuple,
        damage_seed: int | None = None,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            side: pixels of a square frame, a multiple of 8 where it is damaged.
            key: names the scene and its seed, so that equal keys have equal pixels.
            damage_seed: of what a codec would do to it (`stream.damage_table`); None for clean pictures.
        """
        stored = {
            "scene": scene, "times_seconds": times_seconds, "side": side, "source": source, "notes": [],
            "duration_seconds": duration_seconds, "damage_seed": damage_seed, "device": device,
            "key": (*key, side, len(times_seconds), damage_seed),
        }  # fmt: skip
        self.__dict__.update(stored)

    scene: Scene
    side: int
    key: tuple
    damage_seed: int | None
    device: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DrawnFrames) and (self.key, self.times_seconds) == (other.key, other.times_seconds)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"DrawnFrames({self.source!r}, {len(self.times_seconds)} frames of {self.side} pixels)"

    @property
    def pixels(self) -> np.ndarray:
        """[N, side, side, 3] uint8; drawn the first time, then from `PICTURES` as long as it is there."""
        return PICTURES.get(self)

    @property
    def picture_size(self) -> tuple[int, int]:
        """See `Frames`."""
        return self.side, self.side

    @cached_property
    def job(self) -> RenderJob:
        """What to draw, for whoever draws on a device and leaves the pixels there."""
        return scene_job(self.scene, np.asarray(self.times_seconds))

    def on(self, device: str) -> "DrawnFrames":
        """The same clip, to be drawn elsewhere."""
        return DrawnFrames(
            self.scene,
            self.times_seconds,
            self.side,
            self.source,
            self.duration_seconds,
            self.key[:-3],
            self.damage_seed,
            device,
        )

    def draw(self) -> np.ndarray:
        """The pixels, drawn anew on `device`, a few hundred frames at a time."""
        return np.concatenate([part.cpu().numpy() for part in self.parts(self.device)])

    def parts(self, device: torch.device | str) -> Iterator[torch.Tensor]:
        """[n, side, side, 3] uint8 on a device, a few hundred frames at a time, all of them together."""
        table = None if self.damage_seed is None else damage_table(self.damage_seed, len(self.times_seconds))
        first = 0
        for part in split_job(self.job, FRAMES_AT_ONCE):
            drawn = render(part, self.side, device)
            last = first + len(drawn)
            yield drawn if table is None else codec_like_by_frame(drawn, table[first:last])
            first = last


def sampled_times(num_file_frames: int, file_fps: float, limits: VideoLimits, side: int) -> tuple[list[float], int]:
    """(seconds, pixels of a side): what a processor takes from a square video file of so many frames at a constant rate."""
    plan = plan_video(side, side, num_file_frames, file_fps, limits)
    return [round(float(number) / file_fps, TIME_DIGITS) for number in plan.frame_indices], plan.height


def whole_clip_limits(limits: VideoLimits, seconds: float) -> VideoLimits:
    """The limits with a budget for every frame at their rate."""
    least = int(seconds * limits.fps + 1) * limits.min_tokens_per_frame
    return replace(limits, total_tokens=max(limits.total_tokens, least))
