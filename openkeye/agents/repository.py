"""The environment of a small repository with failing tests: files to read and change, tests to run, a patch that is judged.

Files live in memory, so that everything can be pickled; each run of tests writes them into a sandbox of its own.
"""

import json
import posixpath
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openkeye.agents.model_client import Message
from openkeye.agents.sandbox import Limits, Program, Sandbox, is_inner_path
from openkeye.agents.tool_environment import ToolEnvironment
from openkeye.agents.tools import Tool, ToolError, parameters
from openkeye.common.checks import InputError

TEST_LIMITS = Limits(wall_seconds=8.0, cpu_seconds=4.0, memory_bytes=256 << 20, num_processes=16)
MAX_FILE_CHARACTERS = 100_000
MAX_FILES = 100
RUNNER = """
import io, json, os, sys, unittest

dumps, write, token = json.dumps, os.write, sys.stdin.read()
os.chdir("repository")
sys.path[:0] = [os.getcwd()]
results = {}

class Result(unittest.TestResult):
    def addSuccess(self, test):
        results.setdefault(test.id(), "")

    def addFailure(self, test, error):
        results[test.id()] = self._exc_info_to_string(error, test)

    addError = addFailure

    def addSubTest(self, test, subtest, error):
        if error is not None:
            results[test.id()] = self._exc_info_to_string(error, test)

sys.stdout = sys.stderr = io.StringIO()
try:
    unittest.TestLoader().discover("tests", top_level_dir=".").run(Result())
finally:
    write(1, (token + dumps(results)).encode())
"""


@dataclass(frozen=True)
class Repository:
    """Files of a package and of its tests (unittest, under tests/), and a bug to be planted.

    `candidates` are (path, text) of broken files: the first that makes some tests fail and leaves some passing is taken. With
    none, the files are broken as they stand.
    """

    files: Mapping[str, str]
    candidates: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not any(path.startswith("tests/") for path in self.files):
            raise InputError("repository: no tests; put them under tests/")


@dataclass(frozen=True)
class TestRun:
    """What running all tests gave."""

    complaints: Mapping[str, str]
    # of each test that ran: "" where it passed, else its traceback
    end: str = ""
    # why there is no result of any test

    @property
    def passed(self) -> frozenset[str]:
        return frozenset(name for name, complaint in self.complaints.items() if not complaint)


async def run_tests(files: Mapping[str, str], sandbox: Sandbox, limits: Limits = TEST_LIMITS) -> TestRun:
    """Run the tests of a repository in a sandbox.

    A token that only the runner has read stands before the results: what a module prints or how it ends is no result.
    """
    token = secrets.token_hex(16)
    placed = {f"repository/{path}": text for path, text in files.items()}
    ended = await sandbox.run(Program(("python", "runner.py"), {**placed, "runner.py": RUNNER}, token), limits)
    _, mark, results = ended.stdout.rpartition(token)
    if not mark:
        reason = f"stopped at its limit of {ended.limit}" if ended.limit else f"ended with {ended.exit_code}"
        return TestRun({}, f"the test run {reason} {ended.stderr[-500:]}".strip())
    try:
        return TestRun(json.loads(results))
    except json.JSONDecodeError:
        return TestRun({}, "the test run ended in the middle")


class RepositoryEnvironment(ToolEnvironment):
    """Mend a repository. A message without calls hands the patch in.

    Rewards: "outcome" is 1 where all failing tests pass now and no other fails; "fixed" and "kept" are the shares of both. The
    tests are the original ones, whatever became of them, and files outside the package do not count.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        repository: Repository,
        sandbox: Sandbox,
        limits: Limits = TEST_LIMITS,
        **options: Any,
    ) -> None:
        super().__init__(messages, **options)
        self.limits = limits
        self.instructions = self.messages
        self.repository = repository
        self.sandbox = sandbox
        self.files: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.failing: frozenset[str] = frozenset()
        self.passing: frozenset[str] = frozenset()
        self.judged: tuple[dict[str, str], dict[str, float]] | None = None
        # files and what they are worth

    async def begin(self) -> None:
        if not self.failing:
            await self._plant()
        self.files = dict(self.broken)
        self.judged = None
        failing = "\n".join(f"- {name}" for name in sorted(self.failing))
        self.messages = (*self.instructions[:-1], _with_failing(self.instructions[-1], failing))

    async def _plant(self) -> None:
        """Break the files, once and for all resets.

        Raises:
            InputError: no candidate does it.
        """
        for changes in [{path: text} for path, text in self.repository.candidates] or [{}]:
            broken = {**self.repository.files, **changes}
            run = await run_tests(broken, self.sandbox, self.limits)
            failing = frozenset(run.complaints) - run.passed
            if failing and run.passed and not any("_FailedTest" in name for name in failing):
                self.broken, self.failing, self.passing = broken, failing, run.passed
                return
        raise InputError(f"repository: none of {len(self.repository.candidates)} bugs makes some tests fail and leaves some")

    async def tools(self) -> Sequence[Tool]:
        path = {"type": "string", "description": "such as package/module.py"}
        text, line = {"type": "string"}, {"type": "integer", "minimum": 1}
        return (
            Tool("list_files", "All files with their numbers of lines.", parameters({}), self._list),
            Tool(
                "read_file",
                "A file with line numbers, whole or from one line to another.",
                parameters({"path": path}, first_line=line, last_line=line),
                self._read,
            ),
            Tool(
                "search", "Lines of all files that hold a text.", parameters({"text": {**text, "minLength": 1}}), self._search
            ),
            Tool(
                "replace",
                "Replace a text that stands in a file exactly once.",
                parameters({"path": path, "old": {**text, "minLength": 1}, "new": text}),
                self._replace,
            ),
            Tool("write_file", "Write a file whole.", parameters({"path": path, "text": text}), self._write),
            Tool("run_tests", "Run all tests; tells which fail and how.", parameters({}), self._run_tests),
        )

    async def _list(self) -> str:
        return "\n".join(f"{path} ({len(text.splitlines())} lines)" for path, text in sorted(self.files.items()))

    def _text(self, path: str) -> str:
        path = posixpath.normpath(path)
        if path not in self.files:
            raise ToolError(f"there is no file {path!r:.100}; list_files tells which there are")
        return self.files[path]

    async def _read(self, path: str, first_line: int = 1, last_line: int | None = None) -> str:
        lines = self._text(path).splitlines()
        chosen = list(enumerate(lines, 1))[first_line - 1 : last_line]
        return "\n".join(f"{number:4} {line}" for number, line in chosen) or f"no such lines; the file has {len(lines)}"

    async def _search(self, text: str) -> str:
        found = [
            f"{path}:{number}: {line.strip()}"
            for path, content in sorted(self.files.items())
            for number, line in enumerate(content.splitlines(), 1)
            if text in line
        ]
        return "\n".join(found) or "no line holds this text"

    async def _replace(self, path: str, old: str, new: str) -> str:
        text = self._text(path)
        if text.count(old) != 1:
            raise ToolError(f"the text stands {text.count(old)} times in {path:.100}; give one that stands there once")
        return await self._write(path, text.replace(old, new))

    async def _write(self, path: str, text: str) -> str:
        path = posixpath.normpath(path)
        is_new = path not in self.files
        if not is_inner_path(path) or any(known.startswith(path + "/") or path.startswith(known + "/") for known in self.files):
            raise ToolError(f"{path!r:.100} is no path for a file in the repository")
        if len(text) > MAX_FILE_CHARACTERS or (is_new and len(self.files) >= MAX_FILES):
            raise ToolError(f"too much: at most {MAX_FILES} files of at most {MAX_FILE_CHARACTERS} characters")
        self.files[path] = text
        return f"{path} {'made' if is_new else 'changed'}"

    async def _run_tests(self) -> str:
        run = await run_tests(self.files, self.sandbox, self.limits)
        if run.end:
            return run.end
        failed = {name: complaint for name, complaint in run.complaints.items() if complaint}
        parts = [f"{len(run.passed)} passed, {len(failed)} failed"]
        return "\n\n".join([*parts, *(f"{name}\n{complaint.strip()}" for name, complaint in sorted(failed.items()))])

    def patched(self) -> dict[str, str]:
        """What is judged: the package as it stands now, with everything else as it was."""
        original = self.repository.files
        packages = {path.split("/")[0] for path in original if "/" in path} - {"tests"}
        kept = {path: text for path, text in self.files.items() if path.split("/")[0] in packages}
        return {**{path: text for path, text in original.items() if path.split("/")[0] not in packages}, **kept}

    async def score(self) -> Mapping[str, float]:
        if self.judged is None or self.judged[0] != self.files:
            run = await run_tests(self.patched(), self.sandbox, self.limits)
            fixed = len(self.failing & run.passed) / max(1, len(self.failing))
            kept = len(self.passing & run.passed) / max(1, len(self.passing))
            rewards = {"outcome": float(bool(self.failing) and fixed == kept == 1.0), "fixed": fixed, "kept": kept}
            self.judged = (dict(self.files), rewards)
        return {**await super().score(), **self.judged[1]}


def _with_failing(message: Message, failing: str) -> Message:
    return {**message, "content": f"{message['content']}\n\nThese tests fail:\n{failing}"}
