"""Online-judge tasks: a program is compiled and run on hidden tests, and earns the share that it passes."""

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openkeye.agents.sandbox import Ended, Limits, Program, Sandbox
from openkeye.common.checks import InputError
from openkeye.tasks.task import Example, Response

FAILURES = ("no_code", "compile_error", "time_limit", "memory_limit", "runtime_error", "output_limit", "wrong_answer")
MAX_SOURCE_CHARACTERS = 100_000
MAX_SLOW_TESTS = 2
# After so many tests past their time the rest are not run, so that judging ends in time, and count as past it.
COMPILE_LIMITS = Limits(wall_seconds=30.0, cpu_seconds=30.0, memory_bytes=1 << 30)
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Language:
    """How programs of a language are made and run."""

    fences: tuple[str, ...]
    # what stands behind the fence
    file: str
    compiler: tuple[str, ...]
    # empty where nothing is compiled; makes "program"
    command: tuple[str, ...]


LANGUAGES = {
    "python": Language(("python", "python3", "py"), "program.py", (), ("python", "program.py")),
    "c++": Language(
        ("c++", "cpp", "cc", "cxx"), "program.cc", ("c++", "-O2", "-std=c++17", "-o", "program", "program.cc"), ("./program",)
    ),
    "c": Language(("c",), "program.c", ("cc", "-O2", "-o", "program", "program.c", "-lm"), ("./program",)),
}


@dataclass(frozen=True)
class Case:
    """What a program reads, and what it must write."""

    input: str
    output: str


@dataclass(frozen=True)
class Problem:
    """One problem of the judge."""

    statement: str
    tests: tuple[Case, ...]
    # hidden
    samples: tuple[Case, ...] = ()
    # shown
    time_limit_seconds: float = 2.0
    memory_limit_bytes: int = 256 << 20
    tolerance: float = 0.0
    # how far numbers may be off, absolutely or relatively
    reference: str = ""
    # a Python program that passes, if one is known

    def __post_init__(self) -> None:
        if not self.tests or not self.statement:
            raise InputError("code problem: give a statement and at least one hidden test")


@dataclass(frozen=True)
class Verdict:
    """How a program did."""

    outcomes: tuple[str, ...]
    # of each test: "passed" or one of FAILURES; one failure alone where it never came to tests
    message: str = ""
    # the compiler's, or the first failing program's

    @property
    def pass_rate(self) -> float:
        return self.outcomes.count("passed") / len(self.outcomes)

    def rewards(self) -> dict[str, float]:
        """The pass rate as "outcome", 1 as "solved" where all tests pass, and each failure's share of the tests by its name."""
        shares = {name: self.outcomes.count(name) / len(self.outcomes) for name in FAILURES}
        return {"outcome": self.pass_rate, "solved": float(self.pass_rate == 1.0), **shares}


def find_program(text: str, languages: Sequence[str] = ("python", "c++", "c")) -> tuple[str, str] | None:
    """(language, source) of the last fenced program in an answer; a fence without a name holds the first language's.

    None where there is none, or it is in no known language.
    """
    names = {fence: name for name in languages for fence in LANGUAGES[name].fences} | {"": languages[0]}
    found = [(names[fence.lower()], source) for fence, source in FENCE.findall(text) if fence.lower() in names]
    return found[-1] if found and len(found[-1][1]) <= MAX_SOURCE_CHARACTERS else None


def is_same_output(output: str, expected: str, tolerance: float = 0.0) -> bool:
    """Word by word, without regard to spaces; numbers within a tolerance where one is given."""
    words, expected_words = output.split(), expected.split()
    if len(words) != len(expected_words):
        return False
    return all(a == b or (tolerance > 0 and _is_near(a, b, tolerance)) for a, b in zip(words, expected_words, strict=True))


def _is_near(word: str, expected: str, tolerance: float) -> bool:
    try:
        return math.isclose(float(word), float(expected), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


async def judge(problem: Problem, language: str, source: str, sandbox: Sandbox) -> Verdict:
    """Compile a program and run it on all hidden tests.

    Raises:
        InputError: no sandbox on this machine, or no compiler of that language.
        SandboxError: the sandbox broke.
    """
    known = LANGUAGES[language]
    files: Mapping[str, str | bytes] = {known.file: source}
    if known.compiler:
        compiled = await sandbox.run(Program(known.compiler, files, outputs=("program",)), COMPILE_LIMITS)
        if compiled.exit_code == 127:
            raise InputError(f"{language}: no compiler {known.compiler[0]} here; install one, or leave the language out")
        if not compiled.is_success:
            return Verdict(("compile_error",), compiled.stderr[:2000])
        files = compiled.files
    limits = Limits(
        # A program that waits is as slow as one that works; on a busy machine its clock runs on while it does not.
        wall_seconds=problem.time_limit_seconds * 2 + 1,
        cpu_seconds=problem.time_limit_seconds,
        memory_bytes=problem.memory_limit_bytes,
        num_processes=16,
    )
    slow = 0
    message = ""

    async def run(test: Case) -> str:
        nonlocal slow, message
        if slow >= MAX_SLOW_TESTS:
            return "time_limit"
        ended = await sandbox.run(Program(known.command, files, test.input), limits)
        outcome = _outcome(problem, test, ended)
        slow += outcome == "time_limit"
        if outcome != "passed" and not message:
            message = ended.stderr[-2000:]
        return outcome

    outcomes = [await run(problem.tests[0])]
    if known is LANGUAGES["python"] and "SyntaxError" in message and outcomes[0] == "runtime_error":
        return Verdict(("compile_error",), message)
    outcomes += await asyncio.gather(*(run(test) for test in problem.tests[1:]))
    return Verdict(tuple(outcomes), message)


def _outcome(problem: Problem, test: Case, ended: Ended) -> str:
    if ended.limit in ("wall", "cpu"):
        return "time_limit"
    is_full = ended.memory_bytes > 0.95 * problem.memory_limit_bytes
    if ended.limit == "memory" or (
        ended.exit_code != 0 and (is_full or "MemoryError" in ended.stderr or "bad_alloc" in ended.stderr)
    ):
        return "memory_limit"
    if ended.limit in ("output", "file"):
        return "output_limit"
    if ended.exit_code != 0:
        return "runtime_error"
    # The watcher looks every few hundredths of a second, and this may have ended in between.
    if ended.cpu_seconds > problem.time_limit_seconds:
        return "time_limit"
    return "passed" if is_same_output(ended.stdout, test.output, problem.tolerance) else "wrong_answer"


@dataclass(frozen=True)
class CodeTask:
    """Problems of a judge.

    Attributes:
        problems: by number; `GeneratedProblems` or a tuple that `read_problems` made.
        languages: that an answer may be written in.
    """

    problems: Sequence[Problem]
    languages: tuple[str, ...] = ("python", "c++")
    sandbox: Sandbox = field(default_factory=Sandbox)
    name: str = "code"

    def __post_init__(self) -> None:
        unknown = set(self.languages) - set(LANGUAGES)
        if unknown or not self.languages:
            raise InputError(f"{self.name}: languages {self.languages}; choose from {', '.join(LANGUAGES)}")

    @property
    def num_examples(self) -> int | None:
        return len(self.problems)

    def read(self, number: int) -> Example:
        problem = self.problems[number]
        text = [problem.statement]
        for sample in problem.samples:
            text.append(f"Example input:\n{sample.input.rstrip()}\nExample output:\n{sample.output.rstrip()}")
        text.append(
            f"Write a program in {' or '.join(self.languages)} that reads standard input and writes standard output, within "
            f"{problem.time_limit_seconds:g} seconds and {problem.memory_limit_bytes >> 20} MiB. Give it whole in one fenced "
            "block that names its language."
        )
        message = {"role": "user", "content": "\n\n".join(text)}
        return Example(self.name, number, "text", (message,), facts={"problem": problem, "reference": problem.reference})

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        found = find_program(response.text, self.languages)
        if found is None:
            return Verdict(("no_code",)).rewards()
        return (await judge(example.facts["problem"], *found, self.sandbox)).rewards()


def read_problems(path: Path) -> tuple[Problem, ...]:
    """Problems of a JSON-lines file: "statement" (or "question"), "tests" as a list of {"input", "output"} or as
    {"inputs": [...], "outputs": [...]} (also under "input_output"), and optionally "samples", "time_limit_seconds",
    "memory_limit_mb", "tolerance" and "reference".

    Raises:
        InputError: a line that is no such table; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON lines of problems ({error})") from error
    problems = tuple(_problem(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not problems:
        raise InputError(f"{path}: no problems; give one table a line")
    return problems


def _problem(line: str, place: str) -> Problem:
    try:
        row: dict[str, Any] = json.loads(line)
        tests = row.get("tests", row.get("input_output"))
        return Problem(
            statement=str(row.get("statement") or row["question"]),
            tests=_tests(tests),
            samples=_tests(row.get("samples", [])),
            time_limit_seconds=float(row.get("time_limit_seconds", 2.0)),
            memory_limit_bytes=int(float(row.get("memory_limit_mb", 256)) * (1 << 20)),
            tolerance=float(row.get("tolerance", 0.0)),
            reference=str(row.get("reference", "")),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{place}: no problem ({problem}); expected a table with statement and tests") from error


def _tests(rows: Any) -> tuple[Case, ...]:
    if isinstance(rows, str):
        rows = json.loads(rows)
    if isinstance(rows, Mapping):
        rows = [{"input": a, "output": b} for a, b in zip(rows["inputs"], rows["outputs"], strict=True)]
    if not all(isinstance(row[key], str) for row in rows for key in ("input", "output")):
        raise TypeError("inputs and outputs must be strings")
    return tuple(Case(row["input"], row["output"]) for row in rows)
