"""`openkeye tasks` and `openkeye evaluate task`: every path, and what people get wrong."""

import json
from pathlib import Path

import pytest

from openkeye.agents import sandbox
from openkeye.agents.sandbox import SandboxAbilities
from openkeye.apps.commands import main
from openkeye.tasks.registry import TASKS

EVALUATE = ("evaluate", "task", "--model", "openkeye-tiny", "--device", "cpu", "--max-tokens", "4")


def test_tasks_are_listed_and_shown(capsys):
    assert main(["tasks"]) == 0
    assert capsys.readouterr().out.split() == list(TASKS)
    assert main(["tasks", "code", 'families=["power"]', "seed=other", "--first", "7"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "code:7" and shown["modality"] == "text" and "standard input" in shown["messages"][0]["content"]
    assert main(["tasks", "counting", "--num", "1"]) == 0
    assert "<Image" in capsys.readouterr().out
    assert main(["tasks", "api_calls", "level=1"]) == 0
    world = json.loads(capsys.readouterr().out)
    assert world["messages"] and world["tools"]


@pytest.mark.parametrize(("name", "words"), [("arithmetic", ()), ("code", ("seed=other",)), ("api_calls", ("level=1",))])
def test_references_are_chats_to_train_on(tmp_path, capsys, name, words):
    path = tmp_path / "chats.jsonl"
    assert main(["tasks", name, *words, "--num", "3", "--references", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    chats = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(chats) == 3 and all(chat["task"] == name and chat["messages"][-1]["role"] == "assistant" for chat in chats)
    assert all(chat["messages"][-1]["content"] for chat in chats)
    assert name != "api_calls" or all(chat["tools"] for chat in chats)


def mine(folder: Path) -> str:
    lines = [
        {"messages": [{"role": "user", "content": f"{n} + 4?"}], "truth": {"answer": "x"}, "rewards": ["words"]} for n in "12"
    ]
    file = folder / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return f"path={file}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks", "arithmetics"], "did you mean arithmetic"),
        (["tasks", "arithmetic", "seed"], "give option=value"),
        (["tasks", "arithmetic", "--num", "0"], "--num of at least 1"),
        (["tasks", "arithmetic", "--first", "-1"], "--first from 0 on"),
        (["tasks", "json_lines", "MINE", "--first", "2"], "has 2 examples, not 3"),
        (["tasks", "repositories", "--references", "FOLDER/x"], "has no reference answers"),
        (["tasks", "json_lines", "MINE", "--references", "FOLDER/x"], "has no reference answers"),
        (["tasks", "counting", "--references", "FOLDER/x"], "pictures or videos"),
        (["tasks", "arithmetic", "--references", "FOLDER/no/x"], "no/x"),
        ([*EVALUATE, "arithmetics"], "did you mean arithmetic"),
        ([*EVALUATE, "json_lines", "MINE", "--num", "3"], "has 2 examples, not 3"),
        ([*EVALUATE, "arithmetic", "--samples", "0"], "--samples is 0"),
        ([*EVALUATE, "arithmetic", "--num", "1", "--answers", "FOLDER/no/x"], "no/x"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_made(tmp_path, capsys, monkeypatch, words, message):
    from openkeye.apps import evaluate_task

    def never(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(evaluate_task, "_play", never)
    words = [word.replace("MINE", mine(tmp_path)).replace("FOLDER", str(tmp_path)) for word in words]
    assert main(words) != 0
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists() and not said.out


def test_a_model_is_scored_by_a_tasks_rewards(tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    words = [*EVALUATE, "json_lines", mine(tmp_path), "--num", "2", "--samples", "3", "--seed", "5"]
    assert main([*words, "--json", "--answers", str(answers)]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert report["num_examples"] == 2 and report["num_answers"] == len(lines) == 6
    assert len({line["id"] for line in lines}) == 6 and len({line["answer"] for line in lines}) > 1
    assert report["rewards"]["outcome"]["mean"] == sum(line["rewards"]["outcome"] for line in lines) / 6
    low, high = report["rewards"]["outcome"]["interval"]
    assert low <= report["rewards"]["outcome"]["mean"] <= high and 0 < report["mean_tokens"] <= 4
    assert sum(report["finished"].values()) == 6
    assert main([*words[:-4], "--samples", "1"]) == 0
    table = capsys.readouterr().out
    assert "2 examples, 2 answers" in table and "outcome" in table and "0 failed" in table


def test_an_episode_whose_world_breaks_counts_as_nothing_right(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sandbox, "_found", [SandboxAbilities("namespaces", False, True)])
    monkeypatch.setattr(sandbox, "PROCESS", Path("/nowhere.py"))
    answers = tmp_path / "answers.jsonl"
    assert main([*EVALUATE, "repositories", "--num", "2", "--json", "--answers", str(answers)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["finished"] == {"stop": 0, "length": 0, "failed": 2} and report["rewards"]["outcome"]["mean"] == 0.0
    assert [json.loads(line)["finish"] for line in answers.read_text().splitlines()] == ["failed"] * 2
