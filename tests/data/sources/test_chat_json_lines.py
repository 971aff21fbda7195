import json

import pytest

from openkeye.common.checks import InputError
from openkeye.data.sources.chat_json_lines import ChatJsonLines
from tests.data.sources.media import flat, seen, write_clip, write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_clip(folder / "a.mp4")
    write_picture(folder / "b.png")
    write_picture(folder / "c.png", (0, 250, 0))
    return folder


def write_lines(folder, *records, name="chats.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def chat(question, answer="Yes.", **fields):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def read_one(folder, record, **options):
    return ChatJsonLines(write_lines(folder, record), **options).read(0)


def test_openai_parts_are_found_beside_the_file(folder):
    parts = [
        {"type": "video", "video": "a.mp4", "fps": 1.0},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "high"}},
        {"type": "text", "text": "Red?"},
    ]
    sample = read_one(folder, chat(parts, task="colours", video_options={"max_frames": 1}))
    text, num_pictures = seen(sample)
    assert "Red?<|im_end|>" in text and text.endswith("Yes.<|im_end|>") and num_pictures == 2
    assert sample.task == "colours" and sample.name == "chats.jsonl:1"
    assert flat(sample)[0] == ("user", "video", str(folder / "a.mp4"))


def test_placeholders_stand_for_the_listed_media_in_order(folder):
    record = chat("<image>\n<image>\nWhich of <video> is red?\n<video>", images=["b.png", "c.png"], videos=["a.mp4"])
    with pytest.raises(InputError, match=r"chats.jsonl:1: 2 times <video> and 1 files"):
        read_one(folder, record)
    record["messages"][0]["content"] = "<image>\n<image>\nWhich is red?\n<video>"
    assert flat(read_one(folder, record)) == [
        ("user", "image", str(folder / "b.png")),
        ("user", "image", str(folder / "c.png")),
        ("user", "text", "Which is red?"),
        ("user", "video", str(folder / "a.mp4")),
        ("assistant", "text", "Yes."),
    ]


def test_placeholders_without_media_and_in_answers_are_prose(folder):
    assert flat(read_one(folder, chat("Is <image> a tag?", "Yes, <image> is."))) == [
        ("user", "text", "Is <image> a tag?"),
        ("assistant", "text", "Yes, <image> is."),
    ]
    sample = read_one(folder, chat("<image>What is <video>?", "A tag, as <image>.", images=["b.png"]))
    text, num_pictures = seen(sample)
    assert num_pictures == 1 and "What is <video>?" in text and "A tag, as <image>." in text


def test_media_without_a_placeholder_stand_before_the_first_question(folder):
    record = {
        "messages": [{"role": "system", "content": "s"}, *chat("Red?")["messages"]],
        "image": "b.png",
        "videos": ["a.mp4"],
    }
    assert [part[1] for part in flat(read_one(folder, record))] == ["text", "image", "video", "text", "text"]
    empty = chat([{"type": "text", "text": ""}], images=["b.png"])
    assert flat(read_one(folder, empty))[0] == ("user", "image", str(folder / "b.png"))
    bare = chat([{"type": "image"}, {"type": "text", "text": "Red?"}], images=[{"path": "c.png", "bytes": None}])
    assert flat(read_one(folder, bare))[0] == ("user", "image", str(folder / "c.png"))


def test_conversations_of_from_and_value(folder):
    turns = [
        {"from": "human", "value": "<video>\nWhat?"},
        {"from": "function_call", "value": '{"name": "crop", "arguments": {"seconds": 1}}'},
        {"from": "observation", "value": "a circle"},
        {"from": "gpt", "value": "A circle.", "weight": 0},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    sample = read_one(folder, {"system": "Be brief.", "conversations": turns, "video": "a.mp4", "tools": "[]"})
    roles = [message["role"] for message in sample.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert sample.messages[2]["tool_calls"] == [{"name": "crop", "arguments": {"seconds": 1}}]
    assert [message.get("learn", True) for message in sample.messages if message["role"] == "assistant"] == [True, False, True]
    text, num_pictures = seen(sample)
    assert num_pictures == 4 and '<tool_call>\n{"name": "crop", "arguments": {"seconds": 1}}\n</tool_call><|im_end|>' in text


def test_llava_writes_image_for_its_videos(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]
    sample = read_one(folder, {"video": "a.mp4", "conversations": turns})
    assert flat(sample)[:2] == [("user", "video", str(folder / "a.mp4")), ("user", "text", "What?")]


def test_branches_tools_and_plain_text(folder):
    trunk = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    branches = [chat(f"Question {number}?")["messages"] for number in range(2)]
    sample = read_one(folder, {"messages": trunk, "branches": branches})
    text, num_pictures = seen(sample)
    assert num_pictures == 4 and text.count("Yes.<|im_end|>") == 2 and len(sample.branches) == 2
    assert read_one(folder, {"text": "Once.\nTwice."}).text == "Once.\nTwice."


def test_any_line_is_read_alone_and_lines_are_counted_as_an_editor_does(folder):
    path = write_lines(folder, chat("1"), "", chat("é 2"), "\r", chat("3") | {"id": "x" * 70000}, name="many.jsonl")
    source = ChatJsonLines(path)
    assert source.num_samples == 3
    assert [flat(source.read(index))[0][2] for index in (2, 0, 1)] == ["3", "1", "é 2"]
    assert [source.read(index).name for index in range(3)] == ["many.jsonl:1", "many.jsonl:3", "many.jsonl:5"]
    path.write_text("{}")
    with pytest.raises(InputError, match=r"many.jsonl:5: .*shorter"):
        source.read(2)


def test_bad_lines_spoil_themselves_alone(folder):
    bad = {
        "not valid JSON": '{"messages": [',
        "expected an object": "[1, 2]",
        "id; expected messages": {"id": 3},
        "role 'robot'; expected one of": {"messages": [{"role": "robot", "content": "x"}]},
        "no file .*none.png; check the path": chat("<image>", images=["none.png"]),
        "1 times <image> and 2 files": chat("<image>", images=["b.png", "c.png"]),
        "a part of type image without image": chat([{"type": "image"}]),
        "given as 3": chat("x", images=[3]),
        "messages is 3; expected a list": {"messages": 3},
        "branches, .*|a branch without": {"messages": chat("x")["messages"], "branches": [[]]},
        "function_call: not valid JSON": {"conversations": [{"from": "function_call", "value": "{"}]},
        "no user's message": {"messages": [{"role": "assistant", "content": "x"}], "images": ["b.png"]},
        "addresses are not fetched": chat("x", images=["https://example.com/a.png"]),
        "message 'x'; expected an object": {"messages": ["x"]},
        "video_options is": chat("x", video_options=[1]),
    }
    source = ChatJsonLines(write_lines(folder, *bad.values(), chat("fine"), name="bad.jsonl"))
    for index, words in enumerate(bad):
        with pytest.raises(InputError, match=words) as caught:
            source.read(index)
        assert str(caught.value).startswith(f"bad.jsonl:{index + 1}")
    assert flat(source.read(len(bad)))[0][2] == "fine"


WRONG = (None, 33, True, "x", [], {}, [33], {"a": 1}, [[]], float("nan"))


def with_one_wrong(value):
    """Every record that comes of putting something wrong in one place."""
    yield from WRONG
    if isinstance(value, dict):
        for key, item in value.items():
            yield from ({**value, key: wrong} for wrong in with_one_wrong(item))
            yield {other: item for other, item in value.items() if other != key}
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from ([*value[:number], wrong, *value[number + 1 :]] for wrong in with_one_wrong(item))


CALL = {"id": "1", "type": "function", "function": {"name": "crop", "arguments": {"seconds": 1}}}
RECORDS = (
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "b.png", "max_pixels": 784}, {"type": "text", "text": "Red?"}],
            },
            {"role": "assistant", "content": "Hm.", "reasoning_content": "Is it?", "tool_calls": [CALL], "learn": True},
            {"role": "tool", "content": "red"},
            {"role": "assistant", "content": "Yes."},
        ],
        "branches": [[{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]],
        "images": [],
        "video_options": {"fps": 1},
        "task": "t",
    },
    {
        "conversations": [
            {"from": "human", "value": "<image>\nRed, <video>?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}', "weight": 1},
            {"from": "observation", "value": "x"},
            {"from": "gpt", "value": "Yes."},
        ],
        "images": [{"path": "b.png", "bytes": None}],
        "videos": [["b.png", "c.png"]],
        "system": "Is it?",
        "tools": [],
    },
)


@pytest.mark.parametrize("record", RECORDS)
def test_whatever_is_wrong_with_a_record_is_an_input_error(folder, record):
    records = [record, *with_one_wrong(record)]
    source = ChatJsonLines(write_lines(folder, *map(json.dumps, records), name="wrong.jsonl"))
    assert "Is it?" in seen(source.read(0))[0]
    num_refused = 0
    for index in range(1, len(records)):
        try:
            seen(source.read(index))
        except InputError as error:
            assert str(error).startswith(f"wrong.jsonl:{index + 1}"), error
            num_refused += 1
    assert num_refused > len(records) / 3


def test_the_option_media_names_their_folder(folder, tmp_path):
    path = write_lines(tmp_path, chat("<image>", images=["b.png"]))
    with pytest.raises(InputError, match=r"chats.jsonl:1: no file"):
        ChatJsonLines(path).read(0)
    assert flat(ChatJsonLines(path, media=str(folder)).read(0))[0][2] == str(folder / "b.png")
    with pytest.raises(InputError, match="no such folder"):
        ChatJsonLines(path, media=str(folder / "none"))
