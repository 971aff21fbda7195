"""Training text is answering text: what the stream packs into slots is what `encode` makes of a chat."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openkeye.data.slots.frameforge_stream import ClipText, StreamConfig, _straight_span, make_host_batch, to_device
from openkeye.frameforge.stream import make_training_clip
from openkeye.inputs.encode import encode
from openkeye.inputs.processor import Processor
from openkeye.inputs.video import Frames

CONFIG = StreamConfig("openkeye-tiny", 3, 32, 56, lambda step: 16, lambda frames: 1)


@pytest.fixture(scope="module")
def text() -> ClipText:
    return ClipText(Processor.load("openkeye-tiny"))


def test_prefix_and_slot_equal_the_encoded_chat(text):
    batch = make_host_batch(CONFIG, text, 0)
    clip = make_training_clip(3, 0, 16)
    pixels = np.zeros((16, 112, 112, 3), np.uint8)
    frames = Frames(pixels, [float(t) for t in clip.frame_times], "clip", 8.0, [])
    for slot, question in enumerate(clip.questions):
        message = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": question.text}]}
        prompt = encode([message], text.processor).model_input
        layout, arrays = batch.layout, batch.arrays
        start = layout.num_prefix + slot * layout.slot_length
        num_slot = prompt.num_tokens - layout.num_prefix
        packed = [*arrays["input_ids_BL"][0, : layout.num_prefix], *arrays["input_ids_BL"][0, start : start + num_slot]]
        assert packed == prompt.input_ids.tolist()
        places = torch.cat([torch.arange(layout.num_prefix), torch.arange(start, start + num_slot)])
        assert np.array_equal(arrays["position_ids_3L"][:, places], prompt.position_ids)


def test_labels_spell_the_answers(text):
    arrays = make_host_batch(CONFIG, text, 0).arrays
    clip = make_training_clip(3, 1, 16)
    for slot, question in enumerate(clip.questions):
        ids = arrays["label_ids"][arrays["label_slots"] == 8 + slot].tolist()
        assert text.processor.decode(ids, skip_special_tokens=False) == question.answer + "<|im_end|>"
        places = arrays["label_positions"][arrays["label_slots"] == 8 + slot]
        assert arrays["input_ids_BL"].ravel()[places + 1].tolist() == ids


def test_a_batch_is_a_function_of_its_step(text):
    first, again, other = (make_host_batch(CONFIG, text, step) for step in (5, 5, 6))
    ids = [batch.arrays["input_ids_BL"] for batch in (first, again, other)]
    assert np.array_equal(ids[0], ids[1]) and not np.array_equal(ids[0], ids[2])
    drawn, drawn_again = to_device(first, "cpu"), to_device(again, "cpu")
    assert torch.equal(drawn.patches.pixels, drawn_again.patches.pixels)


def test_more_rounds_ask_more_about_the_same_clip(text):
    one = make_host_batch(CONFIG, text, 0)
    two = make_host_batch(replace(CONFIG, num_rounds_at=lambda frames: 2), text, 0)
    assert (one.layout.num_slots, two.layout.num_slots) == (8, 16)
    num_prefix = one.layout.num_prefix
    prefixes = [batch.arrays["input_ids_BL"][:, :num_prefix] for batch in (one, two)]
    assert np.array_equal(*prefixes)
    counts = np.bincount(two.arrays["task_ids_BN"].ravel(), minlength=6)
    assert counts.sum() == 32 and counts[0] == 8 and counts[1:].min() >= 4


def test_hints_point_at_the_asked_thing_and_at_the_figures_to_be_said(text):
    batch = to_device(make_host_batch(CONFIG, text, 0), "cpu")
    ids, num_checked = batch.input_ids_BL, 0
    for clip in range(batch.num_clips):
        for row, track, frame, key in batch.hints[2, clip].tolist():
            if row < 0:
                continue
            assert ids[clip, key] == ids[clip, row + 1], "the hinted key holds the figure that the row must say next"
            shown = batch.token_tracks_BL[clip] == track
            assert (shown & (batch.token_frames_L == frame)).any() or frame >= 0
            num_checked += 1
    assert num_checked > 10


def test_a_cell_is_hinted_to_the_same_thing_in_the_frame_before(text):
    batch = to_device(make_host_batch(CONFIG, text, 0), "cpu")
    num_checked = 0
    for clip in range(batch.num_clips):
        for row, track, frame, _ in batch.hints[4, clip].tolist():
            if row < 0:
                continue
            assert batch.token_tracks_BL[clip, row] == track and batch.token_frames_L[row] == frame + 1
            assert ((batch.token_tracks_BL[clip] == track) & (batch.token_frames_L == frame)).any()
            num_checked += 1
    assert num_checked > 10


def test_a_turning_thing_is_hinted_up_to_its_turn():
    for index in range(40):
        clip = make_training_clip(3, index, 48)
        for number, track in enumerate(clip.scene.tracks):
            if track.turn_seconds is not None:
                first, last = _straight_span(clip, number)
                assert track.intervals[0][0] <= clip.frame_times[first] < clip.frame_times[last] <= track.turn_seconds
                return
    raise AssertionError("no clip with a turn among 40")


def test_cell_tokens_are_the_pads_and_agree_with_the_labels(text):
    batch = to_device(make_host_batch(CONFIG, text, 0), "cpu")
    is_pad = batch.input_ids_BL.flatten() == text.video_pad
    assert torch.equal(batch.cell_tokens, is_pad.nonzero().flatten())
    shown = batch.token_tracks_BL.flatten()[batch.cell_tokens] > 0
    assert torch.equal(shown, batch.cells.sprites > 0)
