"""Questions that take several searches: over made-up worlds, without end, or over people's own pages and questions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.agents.search import Corpus, SearchEnvironment, read_pages
from openkeye.agents.tool_environment import score_transcript
from openkeye.common.checks import InputError
from openkeye.tasks.search_world import Question, World
from openkeye.tasks.task import Example, Response

INSTRUCTIONS = """Answer the question from the pages that you can search and open. No other knowledge is of use. When you know \
the answer, stop calling tools and end with a line "Answer: ..." that holds nothing but the answer.

Question: {question}"""


@dataclass(frozen=True)
class WorldSearchTask:
    """Multi-hop questions over generated worlds.

    Attributes:
        seed: worlds of one seed share nothing with those of another.
        hops: numbers of pages that a question leads through, taken in turn.
        questions_per_world: neighbouring examples ask about the same world.
        max_turns: of an episode.
    """

    seed: str = "train"
    hops: tuple[int, ...] = (2, 3, 4)
    questions_per_world: int = 12
    max_turns: int = 16
    name: str = "search_world"

    def __post_init__(self) -> None:
        if not self.hops or min(self.hops) < 1 or max(self.hops) > 6 or self.questions_per_world < 1:
            raise InputError(f"{self.name}: {self.hops} hops; give numbers from 1 to 6, and 1 or more questions a world")
        if self.max_turns < 1:
            raise InputError(f"{self.name}: max_turns is {self.max_turns}; give at least 1")

    @property
    def num_examples(self) -> int | None:
        return None

    def read(self, number: int) -> Example:
        world = World(f"{self.seed} {number // self.questions_per_world}")
        question = world.question(number, self.hops[number % len(self.hops)])
        return _example(self.name, number, question, Corpus(world.pages()), self.max_turns)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        return await _score(example, response)


@dataclass(frozen=True)
class CorpusSearchTask:
    """People's own questions over their own pages."""

    questions: tuple[Question, ...]
    corpus: Corpus
    max_turns: int = 16
    name: str = "search_corpus"

    @property
    def num_examples(self) -> int | None:
        return len(self.questions)

    def read(self, number: int) -> Example:
        return _example(self.name, number, self.questions[number], self.corpus, self.max_turns)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        return await _score(example, response)


@dataclass(frozen=True)
class CorpusOptions:
    """Somebody's own pages and questions."""

    questions: str
    # JSON lines (`read_questions`)
    pages: str = ""
    # JSON lines (`agents.search.read_pages`)
    index: str = ""
    # instead of pages: a file that `agents.search.write_index` made of them
    max_turns: int = 16

    def __post_init__(self) -> None:
        if bool(self.pages) == bool(self.index):
            raise InputError("search_corpus: give pages, JSON lines, or index, a file made of them")
        if self.max_turns < 1:
            raise InputError(f"search_corpus: max_turns is {self.max_turns}; give at least 1")


def open_corpus_task(options: CorpusOptions) -> CorpusSearchTask:
    """The task over them.

    Raises:
        InputError: a file that cannot be read, or evidence that is not among the pages.
    """
    corpus = Corpus(path=Path(options.index)) if options.index else Corpus(read_pages(Path(options.pages)))
    return CorpusSearchTask(read_questions(Path(options.questions), corpus), corpus, options.max_turns)


def read_questions(path: Path, corpus: Corpus) -> tuple[Question, ...]:
    """Questions of a JSON-lines file: "question", "answers" (or one "answer") and, if known, "evidence" (ids of pages).

    Raises:
        InputError: a line that is no such table, or evidence that the corpus does not have; names the line.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON lines of questions ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            questions.append(_question(line, f"{path}:{number}", corpus))
    if not questions:
        raise InputError(f"{path}: no questions; give one table a line")
    return tuple(questions)


def _question(line: str, place: str, corpus: Corpus) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: no JSON ({error}); give one table a line") from error
    answers: Any = row.get("answers", [row.get("answer")]) if isinstance(row, dict) else None
    if not _are_texts(answers) or not isinstance(row.get("question"), str):
        raise InputError(f"{place}: expected a table with question and answers, got {line:.80}")
    evidence = row.get("evidence", [])
    if not isinstance(evidence, list):
        raise InputError(f"{place}: evidence is {evidence!r:.80}; give a list of ids of pages")
    missing = [id for id in map(str, evidence) if corpus.open(id) is None]
    if missing:
        raise InputError(f"{place}: evidence {', '.join(missing)} is not in the corpus; give ids of its pages")
    return Question(row["question"], tuple(answers), tuple(map(str, evidence)), len(evidence))


def _are_texts(answers: object) -> bool:
    return isinstance(answers, list) and bool(answers) and all(isinstance(answer, str) and answer for answer in answers)


def _example(task: str, number: int, question: Question, corpus: Corpus, max_turns: int) -> Example:
    messages = [{"role": "user", "content": INSTRUCTIONS.format(question=question.text)}]
    facts = vars(question)
    environment = SearchEnvironment(messages, corpus, question.answers, question.evidence, max_turns=max_turns)
    return Example(task, number, "text", (), facts=facts, environment=environment)


async def _score(example: Example, response: Response) -> Mapping[str, float]:
    assert isinstance(example.environment, SearchEnvironment)
    return await score_transcript(example.environment, response.transcript)
