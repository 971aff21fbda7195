"""The judge on real programs: what passes, and each way of failing by its name."""

import asyncio
import dataclasses
import json
import shutil

import pytest

from openkeye.agents.sandbox import Limits, Sandbox
from openkeye.common.checks import InputError
from openkeye.tasks.code import FAILURES, Case, CodeTask, Problem, find_program, is_same_output, judge, read_problems
from openkeye.tasks.code_families import FAMILIES
from openkeye.tasks.code_problems import GeneratedProblems
from openkeye.tasks.task import Response
from tests.agents.test_sandbox import needs_walls

DOUBLE = Problem("Double a number.", (Case("2", "4"), Case("5", "10"), Case("-1", "-2")), time_limit_seconds=0.5)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def outcomes(source: str, language: str = "python", problem: Problem = DOUBLE) -> tuple[str, ...]:
    return asyncio.run(judge(problem, language, source, Sandbox())).outcomes


@needs_walls
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(int(input()) * 2)", ("passed",) * 3),
        ("print(4)", ("passed", "wrong_answer", "wrong_answer")),
        ("print(int(input()) * 2", ("compile_error",)),
        ("print(2 // (int(input()) - 2))", ("runtime_error", "wrong_answer", "wrong_answer")),
        ("while True: pass", ("time_limit",) * 3),
        ("import time; time.sleep(6)", ("time_limit",) * 3),
        ("x = bytearray(10 << 30)", ("memory_limit",) * 3),
        ("while True: print('x' * 1000)", ("output_limit",) * 3),
    ],
)
def test_python_programs_fail_by_name(source, expected):
    problem = dataclasses.replace(DOUBLE, time_limit_seconds=0.2) if "time_limit" in expected else DOUBLE
    assert outcomes(source, "python", problem) == expected


@needs_walls
@needs_compiler
def test_cpp_programs_are_compiled_once_and_fail_by_name():
    head = "#include <iostream>\n#include <vector>\nint main() { long n; std::cin >> n; "
    assert outcomes(head + "std::cout << 2 * n; }", "c++") == ("passed",) * 3
    assert outcomes(head + "std::cout << 2 * m; }", "c++") == ("compile_error",)
    hungry = head + "std::vector<long> v; for (long i = 0; i < (1L << 31); i++) v.push_back(i); std::cout << v[n]; }"
    assert outcomes(hungry, "c++", Problem("x", (Case("2", "4"),), time_limit_seconds=5)) == ("memory_limit",)
    assert outcomes("int main() { int *p = 0; return *p; }", "c") == ("runtime_error",) * 3


@needs_walls
def test_references_pass_and_wrong_programs_fail():
    problems = GeneratedProblems()

    async def judge_all() -> None:
        sandbox = Sandbox(Limits(wall_seconds=20), num_at_once=4)
        for number in range(2, 16, 7):
            verdict = await judge(problems[number], "python", problems[number].reference, sandbox)
            assert set(verdict.outcomes) == {"passed"}, (problems.family(number), verdict)
            wrong = [await judge(problems[number], "python", source, sandbox) for source in problems.wrong_programs(number)]
            assert min(verdict.pass_rate for verdict in wrong) < 1, problems.family(number)

    asyncio.run(judge_all())


def run_here(source: str, text: str) -> str:
    """A program of the families, which read all input and print once, without a process."""
    space: dict = {}
    exec(source.split("\n\nimport sys\n\nprint")[0], space)
    try:
        return space["solve"](text)
    except (ValueError, IndexError, KeyError):
        return "failed"


def test_every_family_tells_its_mistakes_from_its_reference():
    problems = GeneratedProblems("held out")
    missed = {}
    for number in range(len(FAMILIES) * 8):
        problem = problems[number]
        assert all(is_same_output(run_here(problem.reference, case.input), case.output) for case in problem.tests)
        for place, source in enumerate(problems.wrong_programs(number)):
            is_missed = all(is_same_output(run_here(source, case.input), case.output) for case in problem.tests)
            missed.setdefault((problems.family(number), place), []).append(is_missed)
    assert len(FAMILIES) >= 12 and len(missed) == 2 * len(FAMILIES)
    assert all(sum(found) <= 2 for found in missed.values()), missed


def test_problems_are_the_same_in_every_process_and_differ_by_seed():
    assert GeneratedProblems()[7] == GeneratedProblems()[7] != GeneratedProblems("other")[7]
    assert GeneratedProblems()[0].statement != GeneratedProblems()[1].statement
    with pytest.raises(InputError, match="sorting"):
        GeneratedProblems(families=("sorting",))


@needs_walls
def test_the_task_scores_answers():
    task = CodeTask((DOUBLE,))
    example = task.read(0)
    assert "Double a number." in example.messages[0]["content"] and "10" not in example.messages[0]["content"]

    def score(text: str) -> dict:
        return dict(asyncio.run(task.score(example, Response(text))))

    right = score("Thus:\n```python\nprint(1)\n```\nNo:\n```python\nprint(int(input()) * 2)\n```\n")
    assert right["outcome"] == right["solved"] == 1.0
    half = score("```py\nprint(4)\n```")
    assert half["outcome"] == pytest.approx(1 / 3) and half["wrong_answer"] == pytest.approx(2 / 3) and half["solved"] == 0
    nothing = score("print(int(input()) * 2)")
    assert nothing["outcome"] == 0 and nothing["no_code"] == 1 and set(FAILURES) < set(nothing)


def test_programs_are_found_in_answers():
    assert find_program("```cpp\nint x;\n```") == ("c++", "int x;\n")
    assert find_program("```\nx\n```") == ("python", "x\n")
    assert find_program("```rust\nx\n```") is None and find_program("no fence") is None
    assert find_program("```cpp\nx\n```", ("python",)) is None


def test_outputs_are_compared_by_words():
    assert is_same_output("1  2\n3\n", "1 2 3") and not is_same_output("1 2", "1 2 3")
    assert not is_same_output("0.3333", "0.33333") and is_same_output("0.3333", "0.33333", 1e-3)
    assert not is_same_output("nan", "0.3", 1e-3)


def test_problems_are_read_from_lines(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"statement": "a", "tests": [{"input": "1", "output": "2"}], "time_limit_seconds": 1, "memory_limit_mb": 64},
        {"question": "b", "input_output": json.dumps({"inputs": ["1", "2"], "outputs": ["3", "4"]})},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_problems(path)
    assert first.time_limit_seconds == 1 and first.memory_limit_bytes == 64 << 20 and second.tests[1] == Case("2", "4")
    for broken in (
        "{",
        '{"statement": "a"}',
        '{"statement": "a", "tests": []}',
        "[]",
        '{"statement": "a", "tests": [{"input": 1}]}',
    ):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"problems\.jsonl:1"):
            read_problems(path)
