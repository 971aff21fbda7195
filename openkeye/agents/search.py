"""A local corpus with a full-text index (SQLite FTS5, ranked by BM25), and the environment of a question over it."""

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.agents.model_client import Message
from openkeye.agents.tool_environment import ToolEnvironment
from openkeye.agents.tools import Tool, ToolError, parameters
from openkeye.common.checks import InputError

MAX_HITS = 20
TITLE_WEIGHT = 4.0
# how much more a word counts in a title than in the text
SNIPPET_WORDS = 24
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
ANSWER_LINE = re.compile(r"^[\s*_#>]*(?:final\s+)?answer[*_\s]*[:=][*_\s]*(.+?)[\s*_]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One document of a corpus."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    """One result of a search, best first."""

    id: str
    title: str
    snippet: str


def read_pages(path: Path) -> Iterator[Page]:
    """Pages of a JSON-lines file: "id", "text" and, if there is one, "title" on each line.

    Raises:
        InputError: a line that is no such table; names the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _page(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON lines of pages ({error})") from error


def _page(line: str, place: str) -> Page:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: no JSON ({error}); give one table a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("id"), (str, int)):
        raise InputError(f"{place}: expected a table with id and text, got {line:.80}")
    return Page(str(row["id"]), str(row.get("title") or row["id"]), row["text"])


class Corpus:
    """Pages behind a full-text index, in memory or in a file. Pickled, it is its pages, or its file's name.

    Words are compared without accents and by their stems; a query matches pages with any of its words.
    """

    def __init__(self, pages: Iterable[Page] = (), path: Path | None = None) -> None:
        """An index of these pages in memory, or the one that `write_index` left in a file."""
        self.pages = tuple(pages) if path is None else ()
        self.path = path
        if path is not None and not path.is_file():
            raise InputError(f"{path}: no index of a corpus; make one with write_index")
        self._connection: sqlite3.Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    @property
    def connection(self) -> sqlite3.Connection:
        """Opened on first use in this process."""
        if self._connection is None:
            if self.path is None:
                self._connection = sqlite3.connect(":memory:", check_same_thread=False)
                _fill(self._connection, self.pages)
            else:
                uri = self.path.resolve().as_uri() + "?mode=ro"
                self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        return self._connection

    def search(self, query: str, limit: int = 5) -> list[Hit]:
        """Best pages first; none for a query without words."""
        words = "".join(letter if letter.isalnum() else " " for letter in query).split()
        if not words:
            return []
        command = f"""SELECT pages.id, pages.title, snippet(words, 1, '', '', ' ... ', {SNIPPET_WORDS})
            FROM words JOIN pages ON pages.rowid = words.rowid
            WHERE words MATCH ? ORDER BY bm25(words, {TITLE_WEIGHT}, 1.0), pages.rowid LIMIT ?"""
        quoted = " OR ".join(f'"{word}"' for word in dict.fromkeys(words))
        return [Hit(*row) for row in self.connection.execute(command, (quoted, min(limit, MAX_HITS)))]

    def open(self, id: str) -> Page | None:
        """A page by its id."""
        row = self.connection.execute("SELECT id, title, text FROM pages WHERE id = ?", (id,)).fetchone()
        return None if row is None else Page(*row)

    def close(self) -> None:
        """Let go of the index; it is opened again when it is needed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def write_index(pages: Iterable[Page], path: Path) -> int:
    """Index pages in a file for `Corpus(path=...)`; the number of pages.

    Raises:
        InputError: the file is there already, or cannot be written; an id that comes twice.
    """
    if path.exists():
        raise InputError(f"{path}: is there already; remove it or give another name")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        num_pages = _fill(connection, pages)
        connection.close()
        partial.rename(path)
    except (OSError, sqlite3.OperationalError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
    return num_pages


def _fill(connection: sqlite3.Connection, pages: Iterable[Page]) -> int:
    connection.execute("CREATE TABLE pages (rowid INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, text TEXT)")
    connection.execute(
        "CREATE VIRTUAL TABLE words USING fts5(title, text, content='pages', tokenize='porter unicode61 remove_diacritics 2')"
    )
    for page in pages:
        try:
            connection.execute("INSERT INTO pages (id, title, text) VALUES (?, ?, ?)", (page.id, page.title, page.text))
        except sqlite3.IntegrityError as error:
            raise InputError(f"corpus: page {page.id!r} comes twice; give each its own id") from error
    connection.execute("INSERT INTO words (words) VALUES ('rebuild')")
    connection.commit()
    return int(connection.execute("SELECT count(*) FROM pages").fetchone()[0])


def final_answer(text: str) -> str:
    """What stands behind the last "Answer:" of a text, or the whole text where there is none."""
    lines = ANSWER_LINE.findall(text)
    return str(lines[-1]) if lines else text.strip()


def normalised(answer: str) -> str:
    """An answer without case, accents, punctuation and articles; dates as year-month-day, numbers without separators."""
    answer = "".join(c for c in unicodedata.normalize("NFKD", answer.casefold()) if not unicodedata.combining(c))
    answer = re.sub(r"(?<=\d)[,\u2009\u00a0 ](?=\d{3}\b)", "", answer)
    words = [word for word in re.findall(r"[^\W_]+", answer) if word not in ("a", "an", "the")]
    days = [re.sub(r"(?<=\d)(st|nd|rd|th)$", "", word) for word in words if word not in ("of", "on")]
    if len(days) == 3:
        day, month, year = (days[1], days[0], days[2]) if days[0] in MONTHS else days
        if month in MONTHS and day.isdecimal() and year.isdecimal():
            return f"{int(year):04d} {MONTHS.index(month) + 1:02d} {int(day):02d}"
    return " ".join(words)


def is_same_answer(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones, written otherwise. An answer that names two things is neither."""
    return normalised(answer) in {normalised(truth) for truth in truths} - {""}


class SearchEnvironment(ToolEnvironment):
    """A question over a corpus. It ends with the first message that calls nothing, which is the answer.

    Rewards: "outcome" is 1 for one of `answers`; "evidence_opened" and "evidence_found" are the shares of the `evidence` pages
    that were opened, and that were at least among results.
    """

    def __init__(
        self, messages: Sequence[Message], corpus: Corpus, answers: Sequence[str], evidence: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(messages, **options)
        self.corpus = corpus
        self.answers = tuple(answers)
        self.evidence = tuple(evidence)
        self.opened: list[str] = []
        self.found: list[str] = []

    async def begin(self) -> None:
        self.opened, self.found = [], []

    async def tools(self) -> Sequence[Tool]:
        limit = {"type": "integer", "minimum": 1, "maximum": MAX_HITS, "description": "number of results, 5 if not given"}
        query = {"type": "string", "minLength": 1, "description": "words to look for"}
        id_of_page = {"type": "string", "description": "as a search gave it"}
        return (
            Tool("search", "Search the pages for words; best first.", parameters({"query": query}, limit=limit), self._search),
            Tool("open", "Read a page.", parameters({"id": id_of_page}), self._open),
        )

    async def _search(self, query: str, limit: int = 5) -> str:
        hits = self.corpus.search(query, limit)
        self.found += [hit.id for hit in hits]
        if not hits:
            return "no page has any of these words"
        return "\n".join(f"[{hit.id}] {hit.title}: {hit.snippet}" for hit in hits)

    async def _open(self, id: str) -> str:
        page = self.corpus.open(id)
        if page is None:
            raise ToolError(f"there is no page {id!r:.80}; search first, and give the id in brackets")
        self.opened.append(page.id)
        return f"{page.title}\n\n{page.text}"

    async def score(self) -> Mapping[str, float]:
        needed = len(self.evidence) or 1
        is_answered = self.counts.turns > 0 and not self.counts.is_last_a_call
        rewards = {
            "outcome": float(is_answered and is_same_answer(final_answer(self.counts.last_text), self.answers)),
            "evidence_opened": sum(id in self.opened for id in self.evidence) / needed,
            "evidence_found": sum(id in self.found or id in self.opened for id in self.evidence) / needed,
        }
        return {**await super().score(), **rewards}

    async def close(self) -> None:
        self.corpus.close()
