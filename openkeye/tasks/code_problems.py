"""Problems for the judge, made up by number: families of small programs, a reference that passes, wrong ones that fail."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import CodeType
from typing import overload

from openkeye.common.checks import InputError
from openkeye.tasks.code import LANGUAGES, Case, CodeTask, Problem, read_problems
from openkeye.tasks.code_families import FAMILIES, Family, Values

NUM_TESTS = 10
MAIN = "\n\nimport sys\n\nprint(solve(sys.stdin.read()))\n"


@dataclass(frozen=True)
class GeneratedProblems(Sequence[Problem]):
    """Problems by number, each of the families in turn. Seeds share families, and neither constants nor tests.

    Raises:
        InputError: a family that is not there.
    """

    seed: str = "train"
    num_problems: int = 100_000
    families: tuple[str, ...] = tuple(FAMILIES)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown or not self.families:
            raise InputError(f"code families {unknown} are unknown; choose from {', '.join(FAMILIES)}")

    def __len__(self) -> int:
        return self.num_problems

    @overload
    def __getitem__(self, number: int) -> Problem: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Problem]: ...
    def __getitem__(self, number: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not 0 <= number < self.num_problems:
            raise IndexError(number)
        family, values, rng = self._draw(number)
        solve = _function(Template(family.source).substitute(values))
        cases: list[Case] = []
        while len(cases) < NUM_TESTS + 1:
            # Small ones first: the sample is among them.
            text = family.make_input(rng, 1 + len(cases), values)
            cases.append(Case(text, solve(text) + "\n"))
        return Problem(
            statement=Template(family.statement).substitute(values),
            tests=tuple(cases[1:]),
            samples=(cases[0],),
            reference=Template(family.source).substitute(values).strip() + MAIN,
        )

    def wrong_programs(self, number: int) -> list[str]:
        """Programs that look right and fail some hidden test: for tests of judges."""
        family, values, _ = self._draw(number)
        source = Template(family.source).substitute(values).strip()
        wrong = []
        for old, new in family.mistakes:
            old, new = (Template(text).substitute(values) for text in (old, new))
            assert source.count(old) == 1, f"{family}: {old!r} must stand in the source once"
            wrong.append(source.replace(old, new) + MAIN)
        return wrong

    def family(self, number: int) -> str:
        """Name of the family of a problem."""
        return self.families[number % len(self.families)]

    def _draw(self, number: int) -> tuple[Family, Values, random.Random]:
        rng = random.Random(f"openkeye code {self.seed} {number}")
        family = FAMILIES[self.family(number)]
        return family, family.values(rng), rng


@functools.cache
def _compiled(source: str) -> CodeType:
    return compile(source, "<reference>", "exec")


def _function(source: str) -> Callable[[str], str]:
    """`solve` of a reference, which is our own and runs here."""
    space: dict[str, Callable[[str], str]] = {}
    exec(_compiled(source), space)
    return space["solve"]


@dataclass(frozen=True)
class CodeOptions:
    """Which problems."""

    path: str = ""
    # JSON lines of problems (`code.read_problems`); empty: generated ones
    seed: str = "train"
    num_problems: int = 100_000
    families: tuple[str, ...] = tuple(FAMILIES)
    # of generated problems
    languages: tuple[str, ...] = tuple(LANGUAGES)
    # that an answer may be written in

    def __post_init__(self) -> None:
        if self.num_problems < 1:
            raise InputError(f"code: num_problems is {self.num_problems}; give at least 1")


def open_code_task(options: CodeOptions) -> CodeTask:
    """The judge over somebody's problems, or over generated ones.

    Raises:
        InputError: an unreadable file, an unknown family or language.
    """
    if options.path:
        return CodeTask(read_problems(Path(options.path)), options.languages)
    return CodeTask(GeneratedProblems(options.seed, options.num_problems, options.families), options.languages)
