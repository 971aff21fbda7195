"""Charades-STA, QVHighlights, TimeLens and LLaVA-Video: real files in their forms, read back in the project's words."""

import json

import pytest

from openkeye.common.checks import InputError
from openkeye.data.convert import DocumentLimits, to_document
from openkeye.data.sample import UnfitError
from openkeye.data.sources.charades_sta import CharadesSta
from openkeye.data.sources.llava_video import LlavaVideo
from openkeye.data.sources.qvhighlights import QvHighlights
from openkeye.data.sources.timelens import TimeLens
from openkeye.inputs.intervals import parse_intervals
from openkeye.inputs.processor import BUNDLED_DIR, Processor
from tests.data.sources.media import flat, seen, write_clip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "AO8RW.mp4", 40)
    write_clip(folder / "sub" / "v_x.mkv")
    return folder


def answers(sample):
    """What each question is answered, as intervals."""
    turns = sample.branches or [sample.messages[-2:]]
    return [parse_intervals(turn[-1]["content"]) for turn in turns]


def test_charades_sta(tmp_path, videos):
    path = tmp_path / "train.txt"
    path.write_text(
        "AO8RW 0.0 2.9##a person is putting a book on a shelf.\n"
        "AO8RW 1.0 3.5##person closes the door.\n"
        "\n"
        "NONE 1.0 2.0##person runs.\n"
        "AO8RW 1.0 - 2.0##broken.\n"
        "AO8RW 2.0 1.0##backwards.\n"
        "AO8RW 2.0 3.0##  \n"
    )
    source = CharadesSta(annotations=str(path), videos=str(videos))
    assert source.num_samples == 5
    sample = source.read(0)
    assert sample.name == "train.txt:1" and answers(sample) == [[(0.0, 2.9)], [(1.0, 3.5)]]
    assert sample.branches[1][0]["content"] == "When does this happen in the video: person closes the door?"
    assert sample.branches[1][1]["content"] == "From 1.0 to 3.5 seconds."
    text, num_pictures = seen(sample)
    assert num_pictures == 8 and text.count("seconds.<|im_end|>") == 2
    wrong = {
        "4: no video NONE in": 1,
        "5: 'AO8RW 1.0 - 2.0##broken.'; expected VIDEO": 2,
        "6: window 2 to 1 s ends": 3,
        "7: query is": 4,
    }
    for words, index in wrong.items():
        with pytest.raises(InputError, match=f"train.txt:{words}"):
            source.read(index)
    alone = CharadesSta(path, videos=str(videos), groups=False, question="Find {query}!")
    assert alone.num_samples == 6 and answers(alone.read(1)) == [[(1.0, 3.5)]]
    assert [part[1] for part in flat(alone.read(1))] == ["video", "text", "text"]
    assert flat(alone.read(1))[1][2] == "Find person closes the door!"
    with pytest.raises(InputError, match=r"holds \{query\} once"):
        CharadesSta(path, videos=str(videos), question="When?")


def test_answers_about_what_a_stage_cuts_away_do_not_fit_it(tmp_path, videos):
    (tmp_path / "t.txt").write_text("AO8RW 1.0 3.5##person closes the door.\n")
    sample = CharadesSta(tmp_path / "t.txt", videos=str(videos)).read(0)
    processor = Processor.load(BUNDLED_DIR)
    with pytest.raises(UnfitError, match=r"t.txt:1: .*up to 3.5 s"):
        to_document(sample, processor, DocumentLimits(4096, max_clip_seconds=3.0))
    assert to_document(sample, processor, DocumentLimits(4096, max_clip_seconds=3.5)).num_learnt


def test_qvhighlights(tmp_path, videos):
    record = {"qid": 1, "query": "A chef.", "vid": "AO8RW", "duration": 4, "relevant_windows": [[2, 3], [0, 1.5]]}
    lines = [record, {"vid": "AO8RW", "query": "x", "relevant_windows": []}, {**record, "relevant_windows": [[4, 5]]}, [3]]
    (tmp_path / "q.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]) + "\n{ \n")
    source = QvHighlights(tmp_path / "q.jsonl", videos=str(videos))
    sample = source.read(0)
    assert sample.messages[-1]["content"] == "From 0.0 to 1.5 and from 2.0 to 3.0 seconds." and sample.last_told_seconds == 3
    assert answers(sample) == [[(0.0, 1.5), (2.0, 3.0)]] and seen(sample)[1] == 8
    assert source.num_samples == 5
    for index, words in enumerate(
        ("2: windows are", "3: window 4 to 5 s begins behind", "4: .*expected an object", "6: not valid"), 1
    ):
        with pytest.raises(InputError, match=f"q.jsonl:{words}"):
            source.read(index)


def test_timelens_benchmark_and_training_set(tmp_path, videos):
    content = {
        "AO8RW": {"duration": 4.0, "spans": [[0.0, 1.25], [2.0, 3.0]], "queries": ["A man walks.", "A dog runs"]},
        "sub/v_x": {"duration": 2.0, "spans": [[0, 1]], "queries": []},
    }
    (tmp_path / "bench.json").write_text(json.dumps(content))
    source = TimeLens(tmp_path / "bench.json", videos=str(videos))
    assert source.num_samples == 2 and answers(source.read(0)) == [[(0.0, 1.2)], [(2.0, 3.0)]]
    assert source.read(0).name == "bench.json:AO8RW:1"
    with pytest.raises(InputError, match=r"bench.json:sub/v_x: .*as many of both"):
        source.read(1)
    event = {"query": "A man walks.", "span": [[0.5, 1.0], [1.5, 2.0]]}
    lines = [
        {"source": "s", "video_path": "sub/v_x.mkv", "duration": 2.0, "events": [event, {"query": "It ends", "span": [1, 2]}]},
        {"video_path": "sub/v_x.mkv", "events": "none"},
        {"video_path": "sub/v_x.mkv", "events": [{"query": "x", "span": [["0", 1]]}]},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = TimeLens(annotations=str(tmp_path / "train.jsonl"), videos=str(videos))
    assert answers(source.read(0)) == [[(0.5, 1.0), (1.5, 2.0)], [(1.0, 2.0)]] and seen(source.read(0))[1] == 4
    for index, words in ((1, "train.jsonl:2: .*expected video_path"), (2, r"train.jsonl:3:1: window")):
        with pytest.raises(InputError, match=words):
            source.read(index)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match=r"list.json: holds a list"):
        TimeLens(tmp_path / "list.json")


def test_llava_video(tmp_path, videos):
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A bar."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Left."},
    ]
    records = [
        {"id": "1", "video": "sub/v_x.mkv", "conversations": turns, "data_source": "s"},
        {"video": "no.mp4", "conversations": turns},
    ]
    (tmp_path / "l.json").write_text(json.dumps(records))
    source = LlavaVideo(tmp_path / "l.json", videos=str(videos))
    assert source.num_samples == 2
    text, num_pictures = seen(source.read(0))
    assert num_pictures == 4 and "<|vision_end|>What?<|im_end|>" in text and text.endswith("Left.<|im_end|>")
    with pytest.raises(InputError, match=r"l.json:2: no file .*no.mp4"):
        source.read(1)
    for content, words in (("{}", "expected a list"), ("[", "not valid JSON")):
        (tmp_path / "l.json").write_text(content)
        with pytest.raises(InputError, match=f"l.json: .*{words}"):
            LlavaVideo(tmp_path / "l.json")
