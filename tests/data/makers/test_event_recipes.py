"""Temporal grounding and clue choice: answers are read back and compared with the annotations they were made of."""

import json
import re
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.clue_choice import LETTERS, Choice, ClueChoice, read_choice, say_clues
from openkeye.data.makers.events import AnnotatedVideos, merge_windows
from openkeye.data.makers.made_sample import MadeSample
from openkeye.data.makers.temporal_grounding import FORMS, TemporalGrounding
from openkeye.inputs.intervals import parse_intervals
from tests.data.makers.media import film_clip

KITCHEN = {
    "video": "kitchen.mp4",
    "duration": 12.0,
    "events": [
        {"start": 7.0, "end": 8.5, "text": "A dog barks."},
        {"start": 0.5, "end": 2.0, "text": "A dog barks"},
        {"start": 2.5, "end": 4.0, "text": "A man opens the door."},
        {"start": 4.5, "end": 6.0, "text": "A cup falls."},
        {"start": 9.0, "end": 10.5, "text": "The light goes out."},
    ],
}
GARDEN = {
    "video": "garden.mp4",
    "duration": 6.0,
    "events": [
        {"start": 0.0, "end": 2.0, "text": "A child runs.", "score": 4},
        {"start": 2.5, "end": 3.0, "text": "A gate closes.", "score": 1},
        {"start": 4.0, "end": 6.0, "text": "A cup falls.", "score": 3},
    ],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    film_clip(folder / "kitchen.mp4", 0, 12.0)
    film_clip(folder / "garden.mp4", 1, 6.0)
    return folder


def annotated(videos: Path, tmp_path: Path, *records: object) -> AnnotatedVideos:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return AnnotatedVideos(path, videos)


def words(sample: MadeSample) -> tuple[str, str]:
    """Question and answer."""
    return sample.messages[0]["content"][1]["text"], sample.messages[-1]["content"]


def of_task(samples: list[MadeSample], task: str) -> list[MadeSample]:
    return [sample for sample in samples if sample.task == task]


def test_four_forms_and_their_answers(videos: Path, tmp_path: Path):
    recipe = TemporalGrounding(annotated(videos, tmp_path, KITCHEN), max_per_form=9)
    samples = recipe.make(recipe.jobs()[0])
    assert {sample.task for sample in samples} == {form.replace("-", "_") for form in FORMS}
    windows = {
        "A dog barks": [(0.5, 2.0), (7.0, 8.5)],
        "A man opens the door.": [(2.5, 4.0)],
        "A cup falls.": [(4.5, 6.0)],
        "The light goes out.": [(9.0, 10.5)],
    }
    for sample in of_task(samples, "highlight"):
        question, answer = words(sample)
        text = re.search('"(.*)"', question)[1]
        assert parse_intervals(answer) == windows.pop(text)
    assert not windows
    assert "From 0.5 to 2.0 and from 7.0 to 8.5 seconds." in {words(sample)[1] for sample in of_task(samples, "highlight")}
    assert len(of_task(samples, "referred_action")) == 4
    for sample in of_task(samples, "referred_action"):
        question, answer = words(sample)
        start, end = (float(number) for number in re.findall(r"\d+\.\d", question)[:2])
        assert any((event["start"], event["end"]) == (start, end) for event in KITCHEN["events"])
        assert [event["text"].rstrip(".") for event in KITCHEN["events"] if event["start"] == start] == [answer.rstrip(".")]
    (match,) = of_task(samples, "matching")
    question, answer = words(match)
    shown = [float(number) for number in re.findall(r"\d+\.\d", question)[:2]]
    assert [tuple(shown), *parse_intervals(answer)] in ([(0.5, 2.0), (7.0, 8.5)], [(7.0, 8.5), (0.5, 2.0)])
    (summary,) = of_task(samples, "summary")
    assert parse_intervals(words(summary)[1]) == [(0.5, 2.0), (2.5, 4.0), (4.5, 6.0), (7.0, 8.5), (9.0, 10.5)]


def test_videos_may_be_named_without_their_ending(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, KITCHEN | {"video": "kitchen"})
    path, events = source.read(next(iter(source.lines)))
    assert path == videos / "kitchen.mp4" and len(events.events) == 5


def test_a_summary_keeps_what_scores_high(videos: Path, tmp_path: Path):
    recipe = TemporalGrounding(annotated(videos, tmp_path, GARDEN), forms=("summary",))
    (summary,) = recipe.make(recipe.jobs()[0])
    assert words(summary)[1] == "From 0.0 to 2.0 and from 4.0 to 6.0 seconds."


def test_forms_that_would_have_two_right_answers_are_left_out(videos: Path, tmp_path: Path):
    shared = {**GARDEN, "events": [{"start": 0, "end": 4, "text": "a"}, {"start": 1, "end": 5, "text": "b"}]}
    recipe = TemporalGrounding(annotated(videos, tmp_path, shared), forms=("referred-action", "summary", "matching"))
    assert recipe.make(recipe.jobs()[0]) == []


def test_phrasings_vary_and_the_same_seed_gives_the_same(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, KITCHEN)
    job = next(iter(source.lines))
    made = [TemporalGrounding(source, seed).make(job) for seed in range(8)]
    assert TemporalGrounding(source, 3).make(job) == made[3]
    questions = {words(sample)[0] for samples in made for sample in of_task(samples, "summary")}
    assert len(questions) >= 3


def test_windows_that_touch_are_one():
    assert merge_windows([(3.0, 4.0), (0.0, 1.0), (1.0, 2.0), (3.5, 3.7)]) == [(0.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("not json", "Expecting value"),
        ('{"video": "kitchen.mp4", "events": []}', "'duration'"),
        (KITCHEN | {"events": [{"start": 3, "end": 2, "text": "x"}]}, "from 3 to 2 in a video of 12 s"),
        (KITCHEN | {"events": [{"start": 3, "end": 20, "text": "x"}]}, "from 3 to 20"),
        (KITCHEN | {"events": [{"start": 3, "end": 4, "text": " "}]}, "text is ' '"),
        (KITCHEN | {"video": "none.mp4"}, "no such file"),
        (KITCHEN | {"duration": 50.0}, "but its annotation says 50 s"),
    ],
)
def test_bad_lines_are_named_and_do_not_spoil_others(videos: Path, tmp_path: Path, record: object, reason: str):
    source = annotated(videos, tmp_path, GARDEN, record, KITCHEN)
    good, bad, _ = source.lines
    with pytest.raises(InputError, match=re.escape(reason)):
        TemporalGrounding(source).make(bad)
    assert TemporalGrounding(source).make(good)
    assert ClueChoice(source).make(good)


def test_choices_are_read_back(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, KITCHEN, GARDEN)
    kitchen, garden = source.lines
    by_kind: dict[str, set] = {}
    for seed in range(6):
        for sample in ClueChoice(source, seed, num_options=3).make(kitchen):
            question, answer = words(sample)
            choice = read_choice(answer)
            assert choice is not None and choice.letter == sample.truth["letter"]
            # Whole seconds, outwards, around the annotated windows.
            for (start, end), (first, last) in zip(choice.intervals, sample.truth["intervals"], strict=True):
                assert start <= first < start + 1 and end - 1 < last <= end
            options = dict(re.findall(r"^([A-H])\. (.*)$", question, re.MULTILINE))
            right = options[choice.letter]
            assert sample.truth["options"] == list(options.values()) and len(options) == 3
            assert answer.startswith("<think>\n") and f"So the answer is {choice.letter}.\n</think>\n" in answer
            by_kind.setdefault(sample.task, set()).add(right)
            own = {event["text"].rstrip(".") for event in KITCHEN["events"]}
            if sample.task == "clue_choice_what":
                assert [option.rstrip(".") in own for option in options.values()].count(True) == 1
                assert right.rstrip(".") in own
            if sample.task == "clue_choice_count":
                assert right == "2" and list(options.values()) == sorted(options.values(), key=int)
            if sample.task == "clue_choice_next":
                # The door opens, then the cup falls: the only pair with nothing between it.
                assert right == "A cup falls." and "A man opens the door." in question
    assert set(by_kind) == {"clue_choice_what", "clue_choice_next", "clue_choice_count"}
    assert {sample.task for sample in ClueChoice(source, num_options=3).make(garden)} == {
        "clue_choice_what",
        "clue_choice_next",
    }


def test_the_reasoning_checks_segments_in_order_and_names_the_clue(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, KITCHEN, GARDEN)
    samples = ClueChoice(source, num_options=2).make(next(iter(source.lines)))
    (count,) = of_task(samples, "clue_choice_count")
    thought = words(count)[1].partition("</think>")[0]
    assert "[00:00, 00:02]: A dog barks. This is one.\n[00:07, 00:09]: A dog barks. This is one.\nThat makes 2." in thought
    letters = [
        sample.truth["letter"] for seed in range(12) for sample in ClueChoice(source, seed).make(next(iter(source.lines)))
    ]
    assert len(set(letters)) >= 3, "the right option is not always at one place"


def test_one_video_alone_has_no_foreign_sentences(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, GARDEN)
    assert ClueChoice(source).make(next(iter(source.lines))) == []


def test_clues_are_said_in_minutes_and_seconds():
    assert say_clues([(5.2, 8.1), (3599.5, 3600.0)]) == "[[00:05, 00:09], [59:59, 60:00]]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nA or [[00:01, 00:02]] D\n</think>\nB\n[[00:05, 00:08]]", Choice("B", ((5.0, 8.0),))),
        ("The answer is (C). [[00:05, 00:08], [01:10, 1:02:03]]", Choice("C", ((5.0, 8.0), (70.0, 3723.0)))),
        ("Answer: D\nClues: [ [00:05.5,00:08] ]", Choice("D", ((5.5, 8.0),))),
        ("<think>B [[00:05, 00:08]]", None),
        ("<think>B [[00:05, 00:08]]</think> I do not know", None),
        ("B [[00:08, 00:05]]", None),
        ("B [[00:05, later]]", None),
        ("Bread [[00:05, 00:08]]", None),
        ("B from 5 to 8 seconds", None),
        ("B []", None),
        ("", None),
    ],
)
def test_answers_of_models_are_read(text: str, expected: Choice | None):
    assert read_choice(text) == expected


def test_options_that_make_no_sense_are_refused(videos: Path, tmp_path: Path):
    source = annotated(videos, tmp_path, KITCHEN)
    with pytest.raises(InputError, match="2 to 8"):
        ClueChoice(source, num_options=len(LETTERS) + 1)
    with pytest.raises(InputError, match="choose from referred-action"):
        TemporalGrounding(source, forms=("when",))
    with pytest.raises(InputError, match="an empty file"):
        annotated(videos, tmp_path, "").lines  # noqa: B018
