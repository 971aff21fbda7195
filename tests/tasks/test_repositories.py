"""Repositories with planted bugs: mended honestly, or by tricks that do not help; real test runs in the sandbox."""

import asyncio
import pickle

import pytest

from openkeye.agents.loop import run_agent
from openkeye.agents.repository import Repository, RepositoryEnvironment, run_tests
from openkeye.agents.sandbox import Limits, Sandbox
from openkeye.common.checks import InputError
from openkeye.tasks.mutations import mutations
from openkeye.tasks.repositories import RepositoryTask, bugs_of
from openkeye.tasks.repository_templates import ALL, files_of
from openkeye.tasks.task import Response
from tests.agents.scripted import Scripted, call, say
from tests.agents.test_sandbox import needs_walls

SANDBOX = Sandbox(num_at_once=4)
USER = [{"role": "user", "content": "Mend it."}]


def small(body: str = "    return a - b") -> Repository:
    tests = """import unittest
from sums.add import add

class AddTest(unittest.TestCase):
    def test_right(self):
        self.assertEqual(add(2, 3), 5)

    def test_zero(self):
        self.assertEqual(add(2, 0), 2)
"""
    files = {"sums/__init__.py": "", "sums/add.py": f"def add(a, b):\n{body}\n"}
    return Repository({**files, "tests/__init__.py": "", "tests/test_add.py": tests})


def rewards_of(*replies) -> dict:
    environment = RepositoryEnvironment(USER, small(), SANDBOX, Limits(wall_seconds=10, cpu_seconds=1))
    return dict(asyncio.run(run_agent(Scripted([*replies, say("done")]), environment)).rewards)


@needs_walls
def test_templates_pass_their_tests():
    async def run_all():
        return await asyncio.gather(*(run_tests(files_of(name, "some"), SANDBOX) for name in ALL))

    assert len(ALL) >= 8
    for name, run in zip(ALL, asyncio.run(run_all()), strict=True):
        assert len(run.passed) == len(run.complaints) >= 5, (name, run)
        assert 2 <= len([path for path in files_of(name, "some") if path.startswith("some/")]) <= 6
        assert len(bugs_of(name)) >= 25


@needs_walls
def test_the_right_change_earns_the_outcome():
    rewards = rewards_of(call("run_tests"), call("replace", path="sums/add.py", old="a - b", new="a + b"))
    assert rewards == {"valid_calls": 1.0, "outcome": 1.0, "fixed": 1.0, "kept": 1.0}


@needs_walls
@pytest.mark.parametrize(
    ("replies", "fixed", "kept"),
    [
        ([], 0, 1),
        ([call("replace", path="tests/test_add.py", old="5", new="-1")], 0, 1),
        ([call("write_file", path="tests/__init__.py", text="import unittest\nunittest.TestCase.assertEqual = print")], 0, 1),
        ([call("write_file", path="sitecustomize.py", text="print('x')")], 0, 1),
        ([call("write_file", path="unittest/__init__.py", text="")], 0, 1),
        ([call("write_file", path="sums/add.py", text="def add(a, b):\n    return 5")], 1, 0),
        ([call("write_file", path="sums/add.py", text="import os\nos._exit(0)")], 0, 0),
        (
            [call("write_file", path="sums/add.py", text="print({'test_right': ''})\nraise SystemExit")],
            0,
            0,
        ),
        ([call("write_file", path="sums/add.py", text="while True: pass")], 0, 0),
    ],
)
def test_tricks_earn_no_outcome(replies, fixed, kept):
    rewards = rewards_of(*replies)
    assert (rewards["outcome"], rewards["fixed"], rewards["kept"]) == (0, fixed, kept)


@needs_walls
def test_tools_say_what_is_there_and_what_is_wrong():
    environment = RepositoryEnvironment(USER, small(), SANDBOX)

    async def use() -> list[str]:
        opening = await environment.reset()
        assert "tests.test_add.AddTest.test_right" in opening.messages[-1]["content"]
        assert "test_zero" not in opening.messages[-1]["content"]
        replies = [
            call("list_files"),
            call("read_file", path="sums/add.py", first_line=2, last_line=2),
            call("search", text="assertEqual"),
            call("run_tests"),
            call("read_file", path="../etc/passwd"),
            call("replace", path="sums/add.py", old="a", new="b"),
            call("write_file", path="/etc/x", text=""),
            call("write_file", path="sums/add.py/x", text=""),
        ]
        said = []
        for reply in replies:
            # Between two steps an environment may move to another process.
            moved = pickle.loads(pickle.dumps(environment))
            observation = await environment.step(reply)
            assert (await moved.step(reply)).messages == observation.messages or reply.tool_calls[0]["name"] == "run_tests"
            said.append(observation.messages[0]["content"])
        return said

    files, line, found, run, missing, twice, outside, below = asyncio.run(use())
    assert "sums/add.py (2 lines)" in files and line == "   2     return a - b"
    assert "tests/test_add.py:6: self.assertEqual(add(2, 3), 5)" in found
    assert run.startswith("1 passed, 1 failed") and "-1 != 5" in run
    assert "there is no file" in missing and "stands 3 times" in twice
    assert "no path" in outside and "no path" in below


@needs_walls
def test_generated_bugs_fail_tests_and_can_be_mended():
    task = RepositoryTask(sandbox=SANDBOX)

    async def mend(number: int) -> None:
        example = task.read(number)
        original = example.environment.repository.files

        def repair(messages):
            path = next(path for path, text in example.environment.broken.items() if text != original[path])
            return call("write_file", path=path, text=original[path]) if len(messages) == 1 else say("done")

        episode = await run_agent(Scripted(repair), example.environment)
        assert episode.rewards["outcome"] == 1.0, example.facts
        fresh = task.read(number)
        response = Response("", transcript=episode.transcript)
        assert await task.score(fresh, response) == episode.rewards
        assert (await task.score(fresh, Response("")))["outcome"] == 0.0

    async def mend_all() -> None:
        await asyncio.gather(*(mend(number) for number in range(4)))

    asyncio.run(mend_all())


def test_a_repository_without_a_bug_is_refused():
    with pytest.raises(InputError, match="none of 0 bugs"):
        asyncio.run(RepositoryEnvironment(USER, small("    return a + b"), SANDBOX).reset())
    with pytest.raises(InputError, match="tests/"):
        Repository({"a.py": ""})


def test_mutations_change_one_place_each():
    source = 'def f(x):\n    """Doc 1."""\n    if x < 1 and not x == 2:\n        return -x + 1\n    return "ä", x\n'
    changed = mutations(source)
    assert len(set(changed)) == len(changed) >= 8
    lines = source.splitlines()
    for text in changed:
        compile(text, "x", "exec")
        assert sum(a != b for a, b in zip(text.splitlines(), lines, strict=True)) == 1 and "Doc 1." in text
    assert any("x <= 1" in text for text in changed) and any("or not" in text for text in changed)


def test_shares_have_no_bug_in_common():
    seen = [set(bugs_of("cache")[share::2]) for share in range(2)]
    assert not seen[0] & seen[1]
    tasks = [RepositoryTask(share=share, num_shares=2, templates=("cache",)) for share in range(2)]
    candidates = [{text for _, text in task.read(0).environment.repository.candidates} for task in tasks]
    assert candidates[0] and not candidates[0] & candidates[1]
    assert RepositoryTask().read(3).environment.repository == RepositoryTask().read(3).environment.repository
    with pytest.raises(InputError, match="chess"):
        RepositoryTask(templates=("chess",))
