"""FrameForge clips as training batches: scenes and text are made in worker processes, pictures on the training device.

A batch is a pure function of (seed, step), so a resumed run sees the same batches as one that never stopped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from openkeye.common.device import upload
from openkeye.data.slots.hints import ANY, HINTS_PER_SLOT, FrameLayout, answer_hints, cell_hints, cell_map, hint_table
from openkeye.data.slots.slot_batch import NO_LABEL, CellLabels, SlotBatch, SlotLayout
from openkeye.frameforge.catalogue import COLOUR_NAMES, SPRITES
from openkeye.frameforge.questions import TASKS
from openkeye.frameforge.render import RenderJob, join_jobs, render
from openkeye.frameforge.stream import TrainingClip, codec_like, make_training_clip
from openkeye.inputs.patches import patches_from_pixels
from openkeye.inputs.positions import position_ids
from openkeye.inputs.processor import Processor

FRAME_SIDE = 112
# pixels; 8 x 8 patches, 4 x 4 merged cells
CELLS = 4
LABELS_PER_SLOT = 24
# room for the answers of a clip, times its slots: one length for all batches of a layout lets a step be recorded and replayed
NUM_COLOURS = len(COLOUR_NAMES)
NUM_SPRITES = len(SPRITES)


@dataclass(frozen=True)
class StreamConfig:
    """What decides a batch besides its step."""

    model_dir: str
    seed: int
    num_frames_per_step: int
    slot_length: int
    num_frames_at: Callable[[int], int]
    # clip length in frames of each step; a picklable callable
    num_rounds_at: Callable[[int], int]
    # rounds of questions that a clip of so many frames carries, 8 slots each; the same


@dataclass(frozen=True)
class HostBatch:
    """A batch before its pictures are drawn: small, made by a worker, moved to the device as it is.

    Arrays and not tensors: a tensor from another process costs several handshakes with the process that made it.
    """

    layout: SlotLayout
    arrays: dict[str, np.ndarray]
    # by the names of `SlotBatch`
    cells: dict[str, np.ndarray]
    # by the names of `CellLabels`
    job: RenderJob
    seed: int


class ClipText:
    """Token ids of a clip's prefix and slots, the same as `inputs.encode` makes of a chat with one video and one question."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        self.encode_frame = lru_cache(maxsize=20_000)(processor.tokenizer.encode_template)
        special = processor.special_id
        self.video_pad = special("<|video_pad|>")
        self.head = [special("<|im_start|>"), *self.encode("user\n"), special("<|vision_start|>")]
        self.tail = [special("<|vision_end|>")]
        self.after_question = [special("<|im_end|>"), *self.encode("\n"), special("<|im_start|>"), *self.encode("assistant\n")]
        self.after_answer = [special("<|im_end|>")]
        self.figures = {self.encode(figure)[0]: figure for figure in "0123456789."}

    def frame_layout(self, prefix: list[int], num_frames: int) -> FrameLayout:
        """Where the frames stand in a prefix."""
        first = len(self.head)
        per_frame = (len(prefix) - first - len(self.tail)) // num_frames
        return FrameLayout(first, per_frame, per_frame - CELLS * CELLS, num_frames)

    def _encode(self, text: str) -> list[int]:
        return self.processor.encode_text(text)

    def prefix(self, times_seconds: np.ndarray) -> list[int]:
        """Everything up to and with the end of the video."""
        ids = list(self.head)
        pads = [self.video_pad] * (CELLS * CELLS)
        for seconds in times_seconds:
            ids += self.encode_frame(self.processor.frame_text.format(seconds=float(seconds)))
            ids += pads
        return ids + self.tail

    def slot(self, question: str, answer: str) -> tuple[list[int], int]:
        """Tokens of one question with its answer, and where the answer begins."""
        before = [*self.encode(question), *self.after_question]
        return [*before, *self.encode(answer), *self.after_answer], len(before)


@lru_cache(maxsize=64)
def slot_positions(prefix_ids: tuple[int, ...], num_frames: int, video_pad: int, layout: SlotLayout) -> Tensor:
    """[3, L]: the prefix walked as in answering, then every slot from the prefix's end."""
    grids = torch.tensor([[1, 2 * CELLS, 2 * CELLS]]).repeat(num_frames, 1)
    prefix = position_ids(torch.tensor(prefix_ids), None, grids, -1, video_pad, 2)
    slot = int(prefix.max()) + 1 + torch.arange(layout.slot_length)
    return torch.cat([prefix, slot.repeat(layout.num_slots).expand(3, -1)], dim=1)


def make_host_batch(config: StreamConfig, text: ClipText, step: int) -> HostBatch:
    """The batch of one step."""
    num_frames = config.num_frames_at(step)
    num_clips = max(1, config.num_frames_per_step // num_frames)
    clips = [
        make_training_clip(config.seed, step * 4096 + number, num_frames, config.num_rounds_at(num_frames))
        for number in range(num_clips)
    ]
    num_slots = len(clips[0].questions)
    prefixes = [text.prefix(clip.frame_times) for clip in clips]
    layout = SlotLayout(len(prefixes[0]), num_slots, config.slot_length)
    frames = text.frame_layout(prefixes[0], num_frames)
    input_ids = np.zeros((num_clips, layout.num_tokens), np.int32)
    # Unused rows point at different places: sums over many rows of one place are slow.
    labels = np.zeros((num_clips * num_slots * LABELS_PER_SLOT, 3), int)
    labels[:, 0], labels[:, 1] = np.arange(len(labels)), NO_LABEL
    num_labels = 0
    hints: list[list[tuple[int, int, int, int, int]]] = [[] for _ in clips]
    for number, (clip, prefix) in enumerate(zip(clips, prefixes, strict=True)):
        assert len(prefix) == layout.num_prefix, "the frame text must have one length for every time"
        input_ids[number, : layout.num_prefix] = prefix
        for slot, question in enumerate(clip.questions):
            ids, answer_start = text.slot(question.text, question.answer)
            assert len(ids) <= config.slot_length, f"slot of {len(ids)} tokens: {question.text!r} {question.answer!r}"
            start = layout.num_prefix + slot * config.slot_length
            input_ids[number, start : start + len(ids)] = ids
            row = start + answer_start - 1
            first = number * layout.num_tokens + row
            for place, token in enumerate(ids[answer_start:]):
                labels[num_labels] = first + place, token, number * num_slots + slot
                num_labels += 1
            for track, name in question.mentions:
                named = text.encode(question.text[: question.text.index(name) + len(name)])
                hints[number].append((0, start + len(named) - 1, track + 1, ANY, ANY))
            if question.track is not None:
                hints[number] += answer_hints(
                    row,
                    ids[answer_start:],
                    text.figures,
                    question.track + 1,
                    clip.frame_times,
                    frames,
                    _straight_span(clip, question.track) if question.task == "motion" else None,
                )
    job = join_jobs([clip.job for clip in clips])
    cells = job.cell_labels(CELLS)
    tracks = cells.pop("tracks")
    for number, tracks_of_clip in enumerate(tracks.reshape(num_clips, -1)):
        hints[number] += cell_hints(tracks_of_clip, CELLS * CELLS, frames, num_slots * HINTS_PER_SLOT)
    token_frames = np.full(layout.num_tokens, -1, np.int16)
    token_frames[frames.first : frames.first + num_frames * frames.tokens_per_frame] = np.repeat(
        np.arange(num_frames), frames.tokens_per_frame
    )
    positions = slot_positions(_without_times(prefixes[0], text, num_frames), num_frames, text.video_pad, layout)
    arrays = {
        "input_ids_BL": input_ids,
        "label_positions": labels[:, 0],
        "label_ids": labels[:, 1],
        "label_slots": labels[:, 2],
        "position_ids_3L": positions.numpy().astype(np.int32),
        "task_ids_BN": np.array([[TASKS.index(question.task) for question in clip.questions] for clip in clips]),
        "token_tracks_BL": cell_map(tracks, num_clips, CELLS * CELLS, frames, layout),
        "token_frames_L": token_frames,
        "cell_tokens": (np.arange(num_clips)[:, None] * layout.num_tokens + frames.cell_tokens(CELLS * CELLS)).ravel(),
        "hints": hint_table(hints, num_slots * HINTS_PER_SLOT),
    }
    return HostBatch(layout, arrays, cells, job, seed=config.seed * 1_000_003 + step)


def _straight_span(clip: TrainingClip, track: int) -> tuple[int, int] | None:
    """First and last frame in which a track is drawn and has not turned around; None where no frame falls into its time."""
    frames = clip.job.instances[clip.job.instances[:, 9] == track, 0].astype(int)
    turn_seconds = clip.scene.tracks[track].turn_seconds
    if turn_seconds is not None:
        frames = frames[clip.frame_times[frames] <= turn_seconds]
    return (int(frames.min()), int(frames.max())) if len(frames) else None


def _without_times(prefix: list[int], text: ClipText, num_frames: int) -> tuple[int, ...]:
    """The prefix with every text token made equal: positions depend only on where the pads stand, which lets them be reused."""
    return tuple(token if token == text.video_pad else 0 for token in prefix)


def to_device(batch: HostBatch, device: torch.device | str) -> SlotBatch:
    """Draw the frames on the device, with damage like a video codec's, and cut them into patches."""
    generator = torch.Generator().manual_seed(batch.seed)
    frames = codec_like(render(batch.job, FRAME_SIDE, device), generator)
    tensors = {name: upload(torch.from_numpy(array), device) for name, array in batch.arrays.items()}
    # Ids and labels travel narrow and are widened here, where that costs nothing.
    wide = {name: tensor if name.startswith("token_") else tensor.long() for name, tensor in tensors.items()}
    cells = {name: upload(torch.from_numpy(array), device) for name, array in batch.cells.items()}
    labels = CellLabels(**{name: label if name == "offsets" else label.long() for name, label in cells.items()})
    return SlotBatch(layout=batch.layout, patches=patches_from_pixels(frames, 14), cells=labels, **wide)


class HostBatches(IterableDataset):
    """Batches from `first_step` on; worker w of n makes every n-th."""

    def __init__(self, config: StreamConfig, first_step: int) -> None:
        self.config = config
        self.first_step = first_step

    def __iter__(self) -> Iterator[HostBatch]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        step, stride = (self.first_step, 1) if info is None else (self.first_step + info.id, info.num_workers)
        text = ClipText(Processor.load(self.config.model_dir))
        while True:
            yield make_host_batch(self.config, text, step)
            step += stride


def batches(config: StreamConfig, first_step: int, num_workers: int, device: torch.device | str) -> Iterator[SlotBatch]:
    """Device batches of `first_step`, `first_step + 1`, ... without end."""
    loader = DataLoader(
        HostBatches(config, first_step),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context="spawn" if num_workers else None,
    )
    for host_batch in loader:
        yield to_device(host_batch, device)
