"""A folder of one's own: every form that questions may have, what is held out, and what is said when nothing fits."""

import json
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.data.sources.folder import Folder


@pytest.fixture
def folder(tmp_path):
    """Ten videos and a picture by name; the reader opens none of them."""
    for number in range(10):
        (tmp_path / f"clip{number}.mp4").write_bytes(b"video")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a photo.JPG").write_bytes(b"picture")
    return tmp_path


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def turns(sample):
    """(question, answer) pairs of a sample."""
    if sample.branches:
        return [(branch[0]["content"], branch[1]["content"]) for branch in sample.branches]
    content = sample.messages[0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return [(text, sample.messages[1]["content"])]


def test_questions_about_one_video_are_branches_behind_it(folder):
    write_lines(
        folder / "questions.jsonl",
        {"video": "clip0.mp4", "question": "What?", "answer": "This."},
        {"video": "clip1.mp4", "question": "Who?", "answer": "She."},
        {"video": "clip0.mp4", "question": "When?", "answer": "Now."},
    )
    source = Folder(folder)
    first, second = source.read(0), source.read(1)
    assert source.num_samples == 2 and source.num_questions == 3
    assert first.messages == [{"role": "user", "content": [{"type": "video", "video": str(folder / "clip0.mp4")}]}]
    assert turns(first) == [("What?", "This."), ("When?", "Now.")] and first.name == f"{folder.name}/clip0.mp4"
    assert turns(second) == [("Who?", "She.")] and not second.branches and second.messages[0]["content"][0]["type"] == "video"


def test_every_form_of_questions(folder):
    write_lines(
        folder / "chats.jsonl",
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "clip0.mp4"}, {"type": "text", "text": "A?"}]},
                      {"role": "assistant", "content": "a"}]},
        {"video": "clip1.mp4", "messages": [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "b"}]},
        {"video": "clip2.mp4", "questions": [{"text": "C?", "answer": "c"}, {"question": "D?", "answer": "d"}]},
        {"question": "Two and two?", "answer": "Four."},
        {"image": "a photo.JPG", "question": "E?", "answer": "e"},
    )  # fmt: skip
    (folder / "more" / "table.csv").write_text('Video,Question,Answer\n../clip3.mp4,"F, or not?","f"\nclip3.mp4,G?,g\n')
    (folder / "clip4.txt").write_text("A dog runs.\n")
    (folder / "clip5.txt").write_text("Q: H?\nA: h\nand h\n\nQ: I?\nA: i\n")
    (folder / "clip6.json").write_text('[{"question": "J?", "answer": "j"}]')
    source = Folder(folder)
    samples = {source.read(n).name.partition("/")[2]: source.read(n) for n in range(source.num_samples)}
    found = {name: turns(sample) for name, sample in samples.items()}
    assert found == {
        "chats.jsonl:1": [("A?", "a")],
        "clip1.mp4": [("B?", "b")],
        "clip2.mp4": [("C?", "c"), ("D?", "d")],
        "chats.jsonl:4": [("Two and two?", "Four.")],
        "more/a photo.JPG": [("E?", "e")],
        "clip3.mp4": [("F, or not?", "f"), ("G?", "g")],
        "clip4.mp4": [("Describe the video.", "A dog runs.")],
        "clip5.mp4": [("H?", "h\nand h"), ("I?", "i")],
        "clip6.mp4": [("J?", "j")],
    }
    assert samples["chats.jsonl:1"].messages[0]["content"][0]["video"] == str(folder / "clip0.mp4")
    assert samples["more/a photo.JPG"].messages[0]["content"][0] == {
        "type": "image",
        "image": str(folder / "more" / "a photo.JPG"),
    }


def test_a_file_of_questions_comes_before_other_tables_but_not_before_sidecars(folder):
    write_lines(folder / "questions.jsonl", {"video": "clip0.mp4", "question": "A?", "answer": "a"})
    write_lines(folder / "clips.jsonl", {"video": "clip1.mp4", "question": "B?", "answer": "b"})
    (folder / "clip0.txt").write_text("is answered already")
    (folder / "clip2.txt").write_text("Rain.")
    source = Folder(folder)
    assert [turns(source.read(n))[0][1] for n in range(source.num_samples)] == ["a", "Rain."]


def test_a_part_of_a_video(folder):
    line = {"video": "clip0.mp4", "question": "A?", "answer": "a"}
    write_lines(folder / "questions.jsonl", {**line, "start": 1.5, "end": 4}, line)
    source = Folder(folder)
    assert source.read(0).messages[0]["content"][0] | {"video": ""} == {
        "type": "video",
        "video": "",
        "start_seconds": 1.5,
        "end_seconds": 4,
    }
    assert source.num_samples == 2, "other parts of one video are other samples"


def names(source):
    return {source.read(n).messages[0]["content"][0]["video"] for n in range(source.num_samples)}


def test_whole_videos_are_held_out_always_the_same(folder):
    lines = [{"video": f"clip{n}.mp4", "question": q, "answer": "a"} for n in range(10) for q in ("A?", "B?")]
    chat = [{"role": "user", "content": [{"type": "video", "video": "VIDEO"}]}, {"role": "assistant", "content": "c"}]
    lines += [{"messages": json.loads(json.dumps(chat).replace("VIDEO", f"clip{n}.mp4"))} for n in range(10)]
    write_lines(folder / "questions.jsonl", *lines)
    train, held_out = (Folder(folder, part=part, held_out_share=0.2) for part in ("train", "held_out"))
    assert len(names(held_out)) == 2 and len(names(train)) == 8 and not names(train) & names(held_out)
    assert held_out.num_samples == 4, "a video's chats are held out with its questions"
    again = Folder(folder, part="held_out", held_out_share=0.4)
    assert names(held_out) < names(again), "a larger share holds out more, not others"
    others = [names(Folder(folder, part="held_out", held_out_share=0.2, seed=seed)) for seed in range(1, 9)]
    assert any(other != names(held_out) for other in others)
    assert len(names(Folder(folder, part="held_out"))) == 1 and not names(Folder(folder, part="held_out", held_out_share=0))


def test_four_videos_are_all_learnt(folder):
    write_lines(folder / "questions.jsonl", *[{"video": f"clip{n}.mp4", "question": "A?", "answer": "a"} for n in range(4)])
    assert Folder(folder, part="train").num_samples == 4 and Folder(folder, part="held_out").num_samples == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no questions were found among 10 videos, 1 pictures, 1 .jsonl or .csv files and 0 other files; write questions"),
        ('{"video": "clip0.mp4", "question": "A?"}', "questions.jsonl:1: no answer; it holds 'video', 'question'; write for"),
        ('{"video": "clip0.mp4", "answer": "A"}', "questions.jsonl:1: no question"),
        ('{"video": "clib0.mp4", "question": "A?", "answer": "a"}', r"'clib0.mp4' is not in .*; did you mean clip0.mp4\?"),
        ('{"video": "questions.jsonl", "question": "A?", "answer": "a"}', "no video or picture by its ending"),
        ('{"video": "clip0.mp4"', "questions.jsonl:1: not JSON"),
        ("[1]", "questions.jsonl:1: .*expected an object"),
        ('{"video": "clip0.mp4", "questions": 3}', "questions is 3"),
        ('{"messages": [{"role": "user", "content": "A?"}]}', "no message of the assistant"),
        ('{"messages": "A?"}', "messages is 'A"),
    ],
)
def test_what_makes_no_sense_is_told_with_the_line(folder, content, said):
    (folder / "questions.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        Folder(folder)


def test_a_name_twice_in_the_folder_needs_its_path(folder):
    for place in ("x", "y"):
        (folder / place).mkdir()
        (folder / place / "same.mp4").write_bytes(b"video")
    write_lines(folder / "questions.jsonl", {"video": "same.mp4", "question": "A?", "answer": "a"})
    with pytest.raises(InputError, match=r"may be x/same\.mp4 or y/same\.mp4"):
        Folder(folder)


def test_wrong_options_and_folders(folder):
    for options in ({"part": "half"}, {"held_out_share": 1.0}, {"fps": -1.0}):
        with pytest.raises(InputError, match=str(next(iter(options)))):
            Folder(folder, **options)
    with pytest.raises(InputError, match="no such folder"):
        Folder(folder / "nowhere")
    (folder / "questions.csv").write_bytes("Video,Question,Answer\nclip0.mp4,schön?,ja\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"questions\.csv: not UTF-8"):
        Folder(folder)
