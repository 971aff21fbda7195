"""The output folder: nothing is there half or twice, whatever ended the run before."""

import json
from pathlib import Path

import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.made_sample import MadeSample, assistant, image_part, text_part, user, video_part
from openkeye.data.makers.output import OutputFolder
from openkeye.inputs.messages import split_messages


def sample(text: str, **options: object) -> MadeSample:
    return MadeSample([user(text_part("?")), assistant(text)], "test", **options)


def texts(folder: Path) -> list[str]:
    return [json.loads(line)["messages"][-1]["content"] for line in (folder / "data.jsonl").read_text().splitlines()]


def test_lines_hold_messages_with_relative_media_and_truth(tmp_path: Path):
    (tmp_path / "films").mkdir()
    film = tmp_path / "films" / "a.mp4"
    film.write_bytes(b"film")
    question = user(video_part(film, 1.0, 2.5), image_part("pictures/x.png"), text_part("What?"))
    made = MadeSample([question, assistant("That.")], "what", {"count": 3}, {"pictures/x.png": b"png"})
    with OutputFolder(tmp_path / "out", "r", {"seed": 0}) as output:
        output.add("a.mp4", [made])
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert line == {
        "id": "a.mp4/0",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "../films/a.mp4", "start_seconds": 1.0, "end_seconds": 2.5},
                    {"type": "image", "image": "pictures/x.png"},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "That."},
        ],
        "task": "what",
        "truth": {"count": 3},
    }
    _, media = split_messages(line["messages"])
    assert [(tmp_path / "out" / part.content).read_bytes() for part in media] == [b"film", b"png"]
    assert media[0].options == {"start_seconds": 1.0, "end_seconds": 2.5}


def test_copied_media_lie_in_the_folder_and_do_not_collide(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), (255 if name == "a" else 0, 0, 0)).save(tmp_path / name / "sub" / "x.png")
    with OutputFolder(tmp_path / "out", "r", {}, is_copying_media=True) as output:
        for name in ("a", "b"):
            question = user(image_part(tmp_path / name / "sub" / "x.png"))
            output.add(name, [MadeSample([question, assistant(name)], "t")])
    for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = record["messages"][0]["content"][0]["image"]
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / record["messages"][1]["content"] / "sub" / "x.png"
        ).read_bytes()


@pytest.mark.parametrize("torn", ["data", "journal", "both"])
def test_what_a_crash_left_is_cut_off(tmp_path: Path, torn: str):
    with OutputFolder(tmp_path, "r", {"seed": 0}) as output:
        output.add("a", [sample("one"), sample("two")])
    if torn in ("data", "both"):
        with (tmp_path / "data.jsonl").open("a") as file:
            file.write('{"id": "b/0", "messages": [{"role": "user"')
    if torn in ("journal", "both"):
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write('{"job": "b", "num_sam')
    with OutputFolder(tmp_path, "r", {"seed": 0}) as output:
        assert output.done == {"a": 2}
        output.add("b", [sample("three")])
    with OutputFolder(tmp_path, "r", {"seed": 0}) as output:
        assert output.done == {"a": 2, "b": 1}
        assert output.num_samples == 3
    assert texts(tmp_path) == ["one", "two", "three"]


def test_a_job_without_samples_is_done_too(tmp_path: Path):
    with OutputFolder(tmp_path, "r", {}) as output:
        output.add("a", [])
    with OutputFolder(tmp_path, "r", {}) as output:
        assert output.done == {"a": 0}


def test_a_folder_of_other_settings_is_refused(tmp_path: Path):
    with OutputFolder(tmp_path, "r", {"seed": 0, "names": ["a"]}) as output:
        output.add("a", [sample("one")])
    with pytest.raises(InputError, match=r"seed 0 \(now 1\)"):
        OutputFolder(tmp_path, "r", {"seed": 1, "names": ["a"]})
    with pytest.raises(InputError, match="begun by r, not by other"):
        OutputFolder(tmp_path, "other", {"seed": 0, "names": ["a"]})
    assert texts(tmp_path) == ["one"]


def test_strange_folders_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file; give a folder"):
        OutputFolder(tmp_path / "file", "r", {})
    (tmp_path / "data.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"data\.jsonl that no maker began"):
        OutputFolder(tmp_path, "r", {})
    assert (tmp_path / "data.jsonl").read_text() == "mine\n"
    (tmp_path / "journal.jsonl").write_text('{"recipe": "r", "settings": {}}\n["no journal"]\n')
    with pytest.raises(InputError, match="not a maker's journal"):
        OutputFolder(tmp_path, "r", {})


def test_data_shorter_than_its_journal_is_refused(tmp_path: Path):
    with OutputFolder(tmp_path, "r", {}) as output:
        output.add("a", [sample("one")])
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(InputError, match="shorter than its journal"):
        OutputFolder(tmp_path, "r", {})


def test_a_sample_ends_with_what_is_learnt():
    with pytest.raises(ValueError, match="ends with what is learnt"):
        MadeSample([assistant("a"), user(text_part("b"))], "t")
