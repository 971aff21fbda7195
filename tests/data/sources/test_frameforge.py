"""Documents are what `encode` makes of the same chat, token by token and position by position; pictures are drawn together."""

import pickle
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.data.document import Document
from openkeye.data.drawn_pictures import DrawnPictures
from openkeye.data.packed_batch import NO_LABEL, pack
from openkeye.data.sources.frameforge import FrameForgeVideos, VideoOptions, frameforge_source, parse_frames
from openkeye.frameforge.render import scene_job
from openkeye.frameforge.stream import TrainingClip
from openkeye.frameforge.writer import film, make_clip
from openkeye.inputs.encode import encode
from openkeye.inputs.patches import Patches
from openkeye.inputs.processor import Processor
from openkeye.inputs.video import Frames, read_video

SOURCES = {
    "frameforge_videos": {"frames": "16..24"},
    "frameforge_pictures": {"max_pictures": 3},
    "frameforge_text": {},
    "frameforge_captions": {"max_segments": 2},
}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load("openkeye-tiny")


def pixels_of(patches: Patches) -> list[np.ndarray]:
    """Pictures [H, W, 3] uint8 of patches."""
    pictures, first = [], 0
    for _, rows, columns in patches.grid_thw.tolist():
        part = patches.pixels[first : first + rows * columns].reshape(rows, columns, 3, 14, 14).permute(0, 3, 1, 4, 2)
        pictures.append(((part.reshape(rows * 14, columns * 14, 3) + 1) * 127.5).round().to(torch.uint8).numpy())
        first += rows * columns
    return pictures


def generic(document: Document, processor: Processor) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Ids, positions and what is learnt of every path from the root, by reading the document back as a chat and encoding it.

    The chat is found in the document's own text, its media in the document's pictures: nothing here knows FrameForge.
    """
    pictures = [record.patches("cpu") for record in document.pictures]
    trunk_end = document.segments[0][1]
    paths = list(document.segments[1:]) or [(trunk_end, trunk_end)]
    found = []
    for start, end in paths:
        ids = torch.cat([document.input_ids[:trunk_end], document.input_ids[start:end]]).tolist()
        media, messages = iter(pictures), []
        for turn in processor.decode(ids, skip_special_tokens=False).removesuffix("<|im_end|>").split("<|im_end|>\n"):
            role, content = re.fullmatch(r"<\|im_start\|>(user|assistant)\n(.*)", turn, re.DOTALL).groups()
            parts = []
            for piece in re.split(r"(<\|vision_start\|>.*?<\|vision_end\|>)", content, flags=re.DOTALL):
                if not piece.startswith("<|vision_start|>"):
                    parts += [{"type": "text", "text": piece}] if piece else []
                    continue
                drawn = pixels_of(next(media))
                times = [float(text) for text in re.findall(r"<\|frame\|>([\d.]+)", piece)]
                if times:
                    parts.append({"type": "video", "video": Frames(np.stack(drawn), times, "clip", 1e4)})
                else:
                    area = drawn[0].shape[0] * drawn[0].shape[1]
                    image = PIL.Image.fromarray(drawn[0])
                    parts.append({"type": "image", "image": image, "min_pixels": area, "max_pixels": area})
            messages.append({"role": role, "content": parts})
        prompt = encode(messages, processor, add_generation_prompt=False, max_tokens=100_000)
        whole = prompt.model_input
        learnt = torch.zeros(whole.num_tokens, dtype=torch.bool)
        # Learnt is what follows a prompt that the engine would answer, up to and with the end of the turn.
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                first = encode(messages[:number], processor, max_tokens=100_000).model_input.num_tokens
                last = first + whole.input_ids[first:].tolist().index(processor.special_id("<|im_end|>"))
                learnt[first : last + 1] = True
        # The line end behind the last turn is the template's, and nobody's to read.
        found.append((whole.input_ids[:-1].tolist(), whole.position_ids[:, :-1], learnt[:-1]))
    return found


@pytest.mark.parametrize("reader", SOURCES)
def test_every_branch_is_what_encode_makes_of_the_chat(reader, processor):
    source = frameforge_source(reader, "openkeye-tiny", SOURCES[reader])
    for index in range(3):
        document = source.read(index)
        trunk_end = document.segments[0][1]
        branches = document.segments[1:] or ((trunk_end, trunk_end),)
        for (start, end), (ids, positions, learnt) in zip(branches, generic(document, processor), strict=True):
            places = torch.cat([torch.arange(trunk_end), torch.arange(start, end)])
            assert document.input_ids[places].tolist() == ids
            assert torch.equal(document.position_ids[:, places], positions)
            assert torch.equal(document.is_learnt[places], learnt) and learnt.any()
        pads = [processor.image_token_id, processor.video_token_id]
        assert torch.equal(document.is_media, torch.isin(document.input_ids, torch.tensor(pads)))
        if document.pictures:
            assert int(document.is_media.sum()) * 4 == sum(len(part.patches("cpu").pixels) for part in document.pictures)


def test_a_clip_is_what_encode_makes_of_its_film(tmp_path: Path, processor):
    clip = make_clip(3, 1, seconds=(8.0, 9.0))
    film(clip, tmp_path / "clip.mp4")
    frames = read_video(tmp_path / "clip.mp4", processor.video_limits)
    times = np.array(frames.times_seconds)
    source = FrameForgeVideos("openkeye-tiny", 0, VideoOptions())
    document = source.document(TrainingClip(times, clip.scene, scene_job(clip.scene, times), clip.questions), "film", 5)
    trunk_end = document.branches[0]
    assert len(document.branches) == len(clip.questions) == 8
    for (start, end), question in zip(document.segments[1:], clip.questions, strict=True):
        part = {"type": "video", "video": tmp_path / "clip.mp4"}
        message = {"role": "user", "content": [part, {"type": "text", "text": question.text}]}
        prompt = encode([message], processor)
        own = prompt.num_tokens - trunk_end
        places = torch.cat([torch.arange(trunk_end), torch.arange(start, start + own)])
        assert document.input_ids[places].tolist() == prompt.model_input.input_ids.tolist()
        assert torch.equal(document.position_ids[:, places], prompt.model_input.position_ids)
        answer = document.input_ids[start + own : end].tolist()
        assert processor.decode(answer, skip_special_tokens=False) == question.answer + "<|im_end|>"
        assert document.is_learnt[start + own : end].all() and not document.is_learnt[start : start + own].any()
    drawn, filmed = document.pictures[0].patches("cpu"), prompt.model_input.video_patches
    assert torch.equal(drawn.grid_thw, filmed.grid_thw) and (drawn.pixels - filmed.pixels).abs().mean() < 0.1


@pytest.mark.parametrize("reader", SOURCES)
def test_a_number_gives_one_document_in_every_process(reader):
    source = frameforge_source(reader, "openkeye-tiny", {"seed": 7, **SOURCES[reader]})
    copy = pickle.loads(pickle.dumps(source))
    first, again, other = source.read(4), copy.read(4), source.read(5)
    assert source.num_samples is None and first.name == again.name != other.name
    assert torch.equal(first.input_ids, again.input_ids) and not torch.equal(first.input_ids, other.input_ids)
    assert torch.equal(first.position_ids, again.position_ids)
    for ours, theirs in zip(first.pictures, again.pictures, strict=True):
        assert torch.equal(ours.patches("cpu").pixels, theirs.patches("cpu").pixels)
    other_seed = frameforge_source(reader, "openkeye-tiny", {"seed": 8, **SOURCES[reader]}).read(4)
    assert not torch.equal(first.input_ids, other_seed.input_ids)
    assert len(pickle.dumps(first.pictures)) < 40_000


def test_a_pack_draws_its_documents_together_and_each_as_alone(monkeypatch):
    from openkeye.data import drawn_pictures

    sources = [frameforge_source(reader, "openkeye-tiny", options) for reader, options in SOURCES.items()]
    batch = pack([source.read(index) for index in range(2) for source in sources])
    alone = [record.patches("cpu") for record in batch.pictures]
    calls = []
    monkeypatch.setattr(drawn_pictures, "MAX_DRAWN_FRAMES", 50)
    monkeypatch.setattr(drawn_pictures, "render", lambda *a, own=drawn_pictures.render: calls.append(a[1]) or own(*a))
    together = batch.patches()
    assert torch.equal(together.grid_thw, torch.cat([part.grid_thw for part in alone]))
    assert torch.equal(together.pixels, torch.cat([part.pixels for part in alone]))
    num_frames = sum(record.num_pictures for record in batch.pictures if record.canvas == 112)
    assert len(batch.pictures) > 8 and calls.count(112) == -(-num_frames // 50) and len(set(calls)) == 3
    assert batch.media_positions.shape[0] * 4 == together.pixels.shape[0]
    assert batch.num_learnt == int((batch.labels != NO_LABEL).sum()) > 0


def test_damage_is_of_the_seed_and_touches_some_frames():
    job = frameforge_source("frameforge_videos", "openkeye-tiny", {"frames": "60"}).read(0).pictures[0].job
    drawn = [DrawnPictures(job, 112, 112, 112, seed).patches("cpu").pixels.view(60, -1) for seed in range(4)]
    differs = torch.stack([(drawn[0] != other).any(dim=1) for other in drawn[1:]])
    assert differs.any() and not differs.all()
    assert max((drawn[0] - other).abs().mean() for other in drawn[1:]) < 0.1


def test_clips_have_the_lengths_and_the_times_that_were_asked_for(processor):
    options = {"frames": "16..20:1,130..140:2", "sparse_share": 1.0, "max_start_seconds": 3600.0, "num_branches": 5}
    source = frameforge_source("frameforge_videos", "openkeye-tiny", options)
    lengths, has_four_digits = [], 0
    for index in range(40):
        document = source.read(index)
        lengths.append(document.pictures[0].num_pictures)
        assert len(document.branches) == 5
        text = processor.decode(document.input_ids[document.branches[0] :].tolist(), False)
        has_four_digits += bool(re.search(r"\d{4}\.\d", text))
    assert all(16 <= n <= 20 or 130 <= n <= 140 for n in lengths)
    assert 15 < sum(n > 100 for n in lengths) < 38
    assert 5 < has_four_digits < 35
    # Sparse: of a minute, most shows nothing.
    sparse = [source.read(index).pictures[0].job for index, n in enumerate(lengths) if n > 100]
    shown = [len(np.unique(job.instances[:, 0])) / job.num_frames[0] for job in sparse]
    assert np.mean(shown) < 0.6


def test_no_text_falls_to_pieces(processor):
    """The tiny tokenizer knows every byte, so no token is unknown; a text of single letters would be as bad."""
    for reader, options in SOURCES.items():
        source = frameforge_source(reader, "openkeye-tiny", options)
        for index in range(20):
            ids = source.read(index).input_ids.tolist()
            text = processor.decode(ids, skip_special_tokens=False)
            assert "\ufffd" not in text
            words = set(re.sub(r"<[^>]*>|[^a-zA-Z]", " ", text).split())
            assert max(len(processor.encode_text(" " + word)) for word in words) <= 6


@pytest.mark.parametrize(
    ("reader", "options", "said"),
    [
        ("frameforge_videos", {"frames": "many"}, "frames are 'many'; give numbers or ranges"),
        ("frameforge_videos", {"frames": "8..20"}, "give ranges from 16 on"),
        ("frameforge_videos", {"frames": "16:0"}, "weights above 0"),
        ("frameforge_videos", {"sparse_share": 2.0}, "sparse_share is 2.0"),
        ("frameforge_videos", {"side": 100}, "side is 100"),
        ("frameforge_videos", {"size": 1}, "option 'size' is unknown; choose from seed, frames"),
        ("frameforge_videos", {"max_rounds": "two"}, "max_rounds is 'two'; give a int"),
        ("frameforge_videos", {"seed": -1}, "the seed is -1"),
        ("frameforge_pictures", {"max_side": 300}, "give a range up to 224"),
        ("frameforge_pictures", {"min_pictures": 3}, "max_pictures is 1; give at least 3"),
        ("frameforge_text", {"min_seconds": 1.0}, "min_seconds is 1.0; give at least 8"),
        ("frameforge_music", {}, "no reader 'frameforge_music'"),
    ],
)
def test_options_that_make_no_sense_are_refused(reader, options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        frameforge_source(reader, "openkeye-tiny", options)


def test_frames_are_ranges_with_weights():
    assert parse_frames("16..60:3,600:0.5,20") == [(16, 60, 3.0), (600, 600, 0.5), (20, 20, 1.0)]
