"""Small repositories with one bug each: found by their failing tests, mended through tools, judged by all tests."""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from openkeye.agents.repository import Repository, RepositoryEnvironment
from openkeye.agents.sandbox import Sandbox
from openkeye.agents.tool_environment import score_transcript
from openkeye.common.checks import InputError
from openkeye.tasks.mutations import mutations
from openkeye.tasks.repository_templates import ALL, files_of
from openkeye.tasks.task import Example, Response

MAX_TRIES = 16
# bugs that are tried before one makes a test fail; most do at once
PACKAGES = ("core", "kernel", "engine", "tools", "basis", "frame", "atlas", "lattice", "beacon", "harbour", "cobalt", "willow")
INSTRUCTIONS = """The Python package `{package}` in this repository has a bug, and some of its tests fail. Find the bug with \
the tools and mend it in the package. Tests may not be changed: the original ones will judge. When you are done, say so \
without calling a tool."""


@dataclass(frozen=True)
class RepositoryTask:
    """Repositories by number, each template in turn, with a bug drawn by a seed.

    Attributes:
        seed: the bugs of a template are shared out by `num_shares`: seeds of other shares never meet the same bug.
        share: which of the shares this task draws from.
        templates: names of `repository_templates.ALL`.
    """

    seed: str = "train"
    share: int = 0
    num_shares: int = 1
    templates: tuple[str, ...] = tuple(ALL)
    max_turns: int = 30
    sandbox: Sandbox = field(default_factory=Sandbox)
    name: str = "repositories"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.templates) - set(ALL))
        if unknown or not self.templates:
            raise InputError(f"{self.name}: templates {unknown} are unknown; choose from {', '.join(ALL)}")
        if self.max_turns < 1:
            raise InputError(f"{self.name}: max_turns is {self.max_turns}; give at least 1")
        if not 0 <= self.share < self.num_shares <= 8:
            raise InputError(f"{self.name}: share {self.share} of {self.num_shares}; give one below, of at most 8")

    @property
    def num_examples(self) -> int | None:
        return None

    def read(self, number: int) -> Example:
        rng = random.Random(f"openkeye repositories {self.seed} {number}")
        template, package = self.templates[number % len(self.templates)], rng.choice(PACKAGES)
        bugs = list(bugs_of(template)[self.share :: self.num_shares])
        rng.shuffle(bugs)
        files = files_of(template, package)
        candidates = tuple(
            (path.replace("PACKAGE", package), text.replace("PACKAGE", package)) for path, text in bugs[:MAX_TRIES]
        )
        messages = [{"role": "user", "content": INSTRUCTIONS.format(package=package)}]
        environment = RepositoryEnvironment(messages, Repository(files, candidates), self.sandbox, max_turns=self.max_turns)
        return Example(self.name, number, "text", (), facts={"template": template, "package": package}, environment=environment)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        assert isinstance(example.environment, RepositoryEnvironment)
        return await score_transcript(example.environment, response.transcript)


@functools.cache
def bugs_of(template: str) -> tuple[tuple[str, str], ...]:
    """(path, broken text) of every small change to a template's package; some of them no test notices."""
    files = files_of(template, "PACKAGE")
    return tuple((path, text) for path, source in files.items() if not path.startswith("tests/") for text in mutations(source))
