"""Tasks by name: reference answers earn everything, wrong ones do not, and what people give is checked."""

import asyncio
import json
import pickle

import numpy as np
import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOURS
from openkeye.tasks.json_lines import JsonLinesOptions, JsonLinesTask
from openkeye.tasks.judges import Panel
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Response
from tests.tasks.talking import SayingModel

GENERATED = ["arithmetic", "grounding", "counting", "ocr", "spatial", "self_cognition"]
# one answer each, drawn by seed and split; tests of tasks with worlds and programs stand beside those


def scored(task, example, text):
    return asyncio.run(task.score(example, Response(text)))


@pytest.mark.parametrize("name", GENERATED)
def test_reference_answers_earn_everything_and_others_do_not(name):
    task = pickle.loads(pickle.dumps(open_task(name, {"seed": 3})))
    assert task.name == name and task.num_examples is None
    examples = [task.read(number) for number in range(24)]
    answers = [str(example.facts["reference"]) for example in examples]
    for example, answer in zip(examples, answers, strict=True):
        assert scored(task, example, answer)["outcome"] == 1.0, (example.facts, answer)
        assert scored(task, example, "")["outcome"] == scored(task, example, "\x00" * 100)["outcome"] == 0.0
    # Answers of the neighbour are wrong more often than not.
    moved = [scored(task, a, b)["outcome"] for a, b in zip(examples, answers[1:] + answers[:1], strict=True)]
    assert np.mean(moved) < 0.6 or name == "self_cognition"
    assert len({str(example.facts) for example in examples}) > 12 or name == "self_cognition"


@pytest.mark.parametrize("name", GENERATED)
def test_a_number_is_one_question_and_the_test_split_another(name):
    first, again, test = (open_task(name, {"split": split}).read(4) for split in ("train", "train", "test"))
    question = str(first.facts["question"])
    assert question == again.facts["question"] and first.facts == again.facts
    assert (question, first.facts) != (test.facts["question"], test.facts)
    if first.modality == "image":
        pictures = [np.asarray(one.messages[0]["content"][0]["image"]) for one in (first, again, test)]
        assert (pictures[0] == pictures[1]).all() and not np.array_equal(pictures[0], pictures[2])


def test_unsound_references_have_the_right_answer_and_no_sound_steps():
    sound, half, unsound = (open_task("arithmetic", {"seed": 3, "unsound_share": share}) for share in (0.0, 0.5, 1.0))
    num_sound = 0
    for number in range(60):
        example = half.read(number)
        assert example.messages == sound.read(number).messages == unsound.read(number).messages
        rewards = scored(half, example, example.facts["reference"])
        assert rewards["outcome"] == 1.0
        num_sound += rewards["context"] == 1.0
        rewards = scored(unsound, example, unsound.read(number).facts["reference"])
        assert rewards["right_answer_wrong_reasoning"] == 1.0 and rewards["context"] == 0.0
    assert 20 <= num_sound <= 40
    with pytest.raises(InputError, match="unsound_share is 2"):
        open_task("arithmetic", {"unsound_share": 2.0})


def test_boxes_lie_on_what_they_name():
    """Pixels in a box have its object's colour, those around it do not: on plain objects, damage and background aside."""
    task, checked = open_task("grounding", {"side": 224}), 0
    for number in range(40):
        example = task.read(number)
        colour = next((name for name in COLOURS if f" {name} " in example.facts["question"]), None)
        if colour is None or any(word in example.facts["question"] for word in ("digit", "striped", "dotted", "checked")):
            continue
        pixels = np.asarray(example.messages[0]["content"][0]["image"]).astype(float)
        near = np.abs(pixels - np.array(COLOURS[colour])).max(-1) < 60
        for x1, y1, x2, y2 in np.round(np.array(example.facts["boxes"]) * 0.224).astype(int):
            inside = near[y1:y2, x1:x2].mean()
            around = near[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3].sum() - near[y1:y2, x1:x2].sum()
            ring = (y2 - y1 + 6) * (x2 - x1 + 6) - (y2 - y1) * (x2 - x1)
            assert inside > around / ring
            checked += inside > 0.15 and around / ring < 0.1
    assert checked >= 15


def test_lines_of_ones_own_are_asked_and_scored(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "3 + 4?"}], "truth": {"answer": "7"}, "rewards": {"maths": 1, "format": 0.5}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]},
                {"role": "assistant", "content": "2."},
            ],
            "task": "counting",
            "truth": {
                "label": "cup",
                "count": 2,
                "instances": [{"label": "cup", "box": [0, 0, 10, 10]}, {"label": "x", "box": []}],
            },
            "rewards": ["counting"],
        },
        {"messages": [{"role": "user", "content": "Where?"}], "truth": {"answer": "left of it"}, "rewards": {"spatial": 1}},
    ]
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    panel = Panel(SayingModel(['{"verdict": -1}']))
    task = open_task("json_lines", {"path": str(file)}, panel)
    assert task.name == "mine" and task.num_examples == 3
    first, second, third = (task.read(number) for number in range(3))
    said = "<think>3 + 4 = 7.</think><answer>7</answer>"
    assert scored(task, first, said) == {"maths": 1.0, "format": 1.0, "total": 1.5, "outcome": 1.0}
    assert scored(task, first, "7")["outcome"] == 0.0
    assert second.modality == "image" and second.messages[0]["content"][0]["image"] == str(tmp_path / "a.png")
    assert second.facts["reference"] == "2." and second.facts["boxes"] == [[0, 0, 10, 10]] and len(second.messages) == 1
    assert scored(task, second, "There are 2.")["outcome"] == 1.0
    assert scored(task, third, "right of it") == {"spatial": -1.0, "total": -1.0, "outcome": 0.0}
    with pytest.raises(InputError, match="asks a judge"):
        open_task("json_lines", {"path": str(file)}).read(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a table with messages"),
        ('{"messages": []}', "a table with messages"),
        ('{"messages": ["x"]}', "tables with role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "an answer and no question"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "rewards are"),
        ('{"messages": [{"role": "user", "content": "x"}], "rewards": {"mathz": 1}}', "did you mean maths"),
        ('{"messages": [{"role": "user", "content": "x"}], "rewards": ["words"], "truth": 3}', "truth is 3"),
        ('{"messages": [{"role": "user", "content": "x"}], "rewards": ["words"], "modality": "smell"}', "'smell'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_lines_that_are_no_question_tell_why(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(InputError, match=message):
        JsonLinesTask(JsonLinesOptions(str(file))).read(0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmetics", {}, "did you mean arithmetic"),
        ("arithmetic", {"sead": 1}, "did you mean seed"),
        ("arithmetic", {"seed": "x"}, "give a whole number"),
        ("arithmetic", {"seed": True}, "give a whole number"),
        ("arithmetic", {"kinds": ["sums"]}, "kind 'sums'"),
        ("arithmetic", {"reward": "process"}, "reward is 'process'"),
        ("counting", {"side": 4}, "side is 4"),
        ("grounding", {"grounding": {"gate_iou": 2.0}}, "gate_iou"),
        ("self_cognition", {"model_name": " "}, "give a name"),
        ("json_lines", {}, "path is missing"),
        ("api_calls", {"level": 9}, "level is 9"),
        ("api_calls", {"kinds": ["fly"]}, "give some of"),
        ("api_calls", {"judge": "x"}, "judge' is unknown"),
        ("code", {"seed": 3}, "give text"),
        ("code", {"languages": "python"}, "languages is 'python'; give a list"),
        ("code", {"languages": ["rust"]}, "choose from python"),
        ("code", {"families": ["sorting"]}, "sorting"),
        ("code", {"num_problems": 0}, "num_problems is 0"),
        ("code", {"path": "/nowhere.jsonl"}, "cannot be read"),
        ("repositories", {"templates": ["chess"]}, "chess"),
        ("repositories", {"share": 2}, "share 2 of 1"),
        ("repositories", {"max_turns": 0}, "max_turns is 0"),
        ("repositories", {"sandbox": 3}, "a table of its options"),
        ("repositories", {"sandbox": {"num_at_once": 0}}, "num_at_once is 0"),
        ("search_world", {"hops": 3}, "hops is 3; give a list"),
        ("search_world", {"hops": [2.5]}, "give a list"),
        ("search_world", {"hops": [9]}, "from 1 to 6"),
        ("search_world", {"max_turns": 0}, "max_turns is 0"),
        ("search_corpus", {"pages": "/nowhere.jsonl"}, "questions is missing"),
        ("search_corpus", {"questions": "/nowhere.jsonl"}, "give pages"),
        ("search_corpus", {"questions": "/nowhere.jsonl", "pages": "/nowhere.jsonl"}, "cannot be read"),
        ("search_corpus", {"questions": "/nowhere.jsonl", "index": "/nowhere.index"}, "no index"),
        ("json_lines", {"path": "/nowhere.jsonl"}, "cannot be read"),
    ],
)
def test_wrong_names_and_options_are_told(name, options, message):
    with pytest.raises(InputError, match=message):
        open_task(name, options)


def test_agents_tasks_open_by_name_with_their_options(tmp_path):
    code = open_task("code", {"seed": "other", "families": ["power"], "languages": ["c"], "num_problems": 5})
    assert code.num_examples == 5 and "in c that reads" in code.read(4).messages[0]["content"]
    (tmp_path / "problems.jsonl").write_text('{"statement": "Mine.", "tests": [{"input": "1", "output": "2"}]}')
    mine = open_task("code", {"path": str(tmp_path / "problems.jsonl")})
    assert mine.num_examples == 1 and mine.read(0).messages[0]["content"].startswith("Mine.")
    repositories = open_task(
        "repositories", {"templates": ["cache"], "share": 1, "num_shares": 2, "sandbox": {"num_at_once": 2}}
    )
    assert repositories.read(0).facts["template"] == "cache" and repositories.sandbox.num_at_once == 2
    world = open_task("search_world", {"hops": [3], "seed": "test"})
    assert world.num_examples is None and world.read(0).facts != open_task("search_world", {"hops": [3]}).read(0).facts
    (tmp_path / "pages.jsonl").write_text('{"id": "a", "title": "Sky", "text": "The sky is blue."}')
    (tmp_path / "questions.jsonl").write_text('{"question": "Which colour?", "answer": "blue", "evidence": ["a"]}')
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("pages", "questions")}
    corpus = open_task("search_corpus", files)
    assert corpus.num_examples == 1 and corpus.read(0).facts["answers"] == ("blue",)
    calls = open_task("api_calls", {"level": 1, "split": "train", "wording": "plain"})
    assert calls.max_calls == 1 and calls.read(0).environment is not None
    for task in (code, repositories, world, corpus, calls):
        again = pickle.loads(pickle.dumps(task))
        assert (again.name, again.read(0).facts) == (task.name, task.read(0).facts)
