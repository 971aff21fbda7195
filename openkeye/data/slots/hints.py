"""Attention hints: where a few rows of a few layers should look, known because we drew the scene.

A training-only help. Finding a named object and copying the time of its first frame takes three hops of attention, and
gradient descent on answers alone stays long on a plateau before it finds them. A hint names, for one row (a token of a
slot, or a cell) and one hop, the keys that hold what the row needs:

    hop 0  the cells that show the asked thing, in any frame
    hop 1  the same cells in the frame whose time is being said
    hop 2  the token of that frame's time text which holds the very figure to be said next
    hop 3  the same cells in the thing's first frame, beside hop 1 in its last: where it came from and where it went
    hop 4  for a cell: the same thing in the frame before, from which it has moved, or after which it has come back
"""

from dataclasses import dataclass

import numpy as np

from openkeye.data.slots.slot_batch import SlotLayout

NUM_HOPS = 5
HINTS_PER_SLOT = 4
# of each hop, times the slots of a clip; the surplus of a clip is dropped
COLUMNS = ("row", "track", "frame", "key")
ANY = -1


@dataclass(frozen=True)
class FrameLayout:
    """Where the frames of a clip stand in its prefix."""

    first: int
    # index of the first frame's first token
    tokens_per_frame: int
    text_tokens: int
    # before the cells: the marker and the figures of the time
    num_frames: int

    def cells(self, frame: int) -> int:
        """Index of a frame's first cell."""
        return self.first + frame * self.tokens_per_frame + self.text_tokens

    def cell_tokens(self, num_cells: int) -> np.ndarray:
        """[frames * cells] index of every cell in the clip, frame after frame."""
        starts = self.cells(0) + np.arange(self.num_frames) * self.tokens_per_frame
        return (starts[:, None] + np.arange(num_cells)).ravel()


def answer_hints(
    row: int,
    ids: list[int],
    figures: dict[int, str],
    track: int,
    frame_times: np.ndarray,
    frames: FrameLayout,
    span: tuple[int, int] | None,
) -> list[tuple[int, int, int, int, int]]:
    """Hints of one slot about one thing, as (hop, row, track, frame, key).

    Args:
        row: index in the clip of the token that predicts `ids[0]`.
        ids: the answer's tokens.
        figures: token id -> character, for the ten digits and the point.
        track: 1-based number of the asked thing in the clip.
        frame_times: [F] seconds of the clip's frames.
        frames: where their tokens are.
        span: for questions about motion, the first frame of the thing and the one to which it moves straight.
    """
    hints = [(0, row, track, ANY, ANY)]
    if span is not None:
        hints += [(1, row, track, span[1], ANY), (3, row, track, span[0], ANY)]
    place = 0
    while place < len(ids):
        end = place
        while end < len(ids) and ids[end] in figures:
            end += 1
        number = "".join(figures[token] for token in ids[place:end])
        if "." in number[1:-1]:
            frame = int(np.abs(frame_times - float(number)).argmin())
            for offset in range(place, end):
                # The time text has leading zeros, so figures are matched from the right.
                key = frames.cells(frame) - (end - offset)
                hints.append((1, row + offset, track, frame, ANY))
                hints.append((2, row + offset, track, frame, key))
        place = max(end, place + 1)
    return hints


def cell_hints(tracks: np.ndarray, num_cells: int, frames: FrameLayout, num_hints: int) -> list[tuple[int, int, int, int, int]]:
    """Hop 4 of one clip, from the labels of its frames * num_cells cells: at most `num_hints` rows, evenly over the clip."""
    shown = tracks.reshape(-1, num_cells)
    same = shown[1:, :, None] == shown[:-1, None, :]
    frame, cell = np.nonzero((shown[1:] > 0) & same.any(axis=2))
    picked = np.linspace(0, len(frame) - 1, min(len(frame), num_hints)).astype(int)
    return [
        (4, frames.cells(int(before) + 1) + int(place), int(shown[before + 1, place]), int(before), ANY)
        for before, place in zip(frame[picked], cell[picked], strict=True)
    ]


def hint_table(hints_of_clips: list[list[tuple[int, int, int, int, int]]], num_hints: int) -> np.ndarray:
    """[hops, B, num_hints, 4] int32, columns as COLUMNS; a row of -1 is empty."""
    table = np.full((NUM_HOPS, len(hints_of_clips), num_hints, len(COLUMNS)), -1, np.int32)
    for clip, hints in enumerate(hints_of_clips):
        for hop in range(NUM_HOPS):
            rows = [hint[1:] for hint in hints if hint[0] == hop][:num_hints]
            if rows:
                table[hop, clip, : len(rows)] = rows
    return table


def cell_map(tracks: np.ndarray, num_clips: int, num_cells: int, frames: FrameLayout, layout: SlotLayout) -> np.ndarray:
    """Which track each token of each clip shows: [B, L] int16, 0 for none, from the [frames * cells] labels of all clips."""
    tokens = np.zeros((num_clips, layout.num_tokens), np.int16)
    tokens[:, frames.cell_tokens(num_cells)] = tracks.reshape(num_clips, -1)
    return tokens
