"""One's own questions from a file of JSON lines.

    {"messages": [{"role": "user", "content": "..."}], "truth": {"answer": "19"}, "rewards": {"maths": 1.0, "format": 0.1}}

`truth` holds what the named rewards (`rewards.table.REWARDS`) compare with. `rewards` may stand in the task's options instead.
What `openkeye make-data` writes is read as it is: a last message of the assistant is the reference answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.tasks.judges import Panel
from openkeye.tasks.rewards.reward import Composed, compose
from openkeye.tasks.rewards.table import make_reward
from openkeye.tasks.task import MODALITIES, Example, Response

MEDIA = ("image", "video")


@dataclass(frozen=True)
class JsonLinesOptions:
    """Which file, and how its answers are scored."""

    path: str
    name: str = ""
    # of the task; default: the file's, without its ending
    media: str = ""
    # folder that paths of media are relative to; default: the file's own
    rewards: Mapping[str, float] = field(default_factory=dict)
    # weights by name, for lines that name none; the first is the outcome
    rewards_by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # the same for lines whose `task` is among these, as `openkeye make-data` writes it
    reward_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # by name of a reward

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("path is empty; give a file of JSON lines")


class JsonLinesTask:
    """See `Task`."""

    def __init__(self, options: JsonLinesOptions, panel: Panel | None = None) -> None:
        """panel: the judge of rewards that ask one.

        Raises:
            InputError: no such file, or a reward that does not exist.
        """
        self.options = options
        self._path = Path(options.path)
        self._panel = panel
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise InputError(f"{options.path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
        self._lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        self._folder = Path(options.media) if options.media else self._path.parent
        self._composed: dict[tuple[tuple[str, float], ...], Composed] = {}
        for rewards in filter(None, (options.rewards, *options.rewards_by_task.values())):
            self._scores_of(rewards, "the task's options")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_composed": {}}

    @property
    def name(self) -> str:
        return self.options.name or self._path.stem

    @property
    def num_examples(self) -> int | None:
        """See `Task`."""
        return len(self._lines)

    def read(self, number: int) -> Example:
        """See `Task`.

        Raises:
            InputError: there is no such line, or it is no question.
        """
        if not 0 <= number < len(self._lines):
            raise InputError(f"{self._path}: has questions 0 to {len(self._lines) - 1}, asked for {number}")
        line_number, line = self._lines[number]
        where = f"{self._path.name}:{line_number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}); mend or remove it") from error
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
            raise InputError(f"{where}: expected a table with messages, got {record!r:.80}")
        messages, facts = list(record["messages"]), dict(_table(record, "truth", where))
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise InputError(f"{where}: messages are {messages!r:.80}; give tables with role and content")
        if messages[-1]["role"] == "assistant":
            facts.setdefault("reference", messages.pop()["content"])
            if not messages:
                raise InputError(f"{where}: holds an answer and no question; put a message of the user before it")
        _add_known(facts)
        by_task = self.options.rewards_by_task.get(str(record.get("task")), self.options.rewards)
        rewards = record.get("rewards", by_task)
        if isinstance(rewards, list):
            rewards = dict.fromkeys(rewards, 1.0)
        self._scores_of(rewards, where)
        facts |= {"rewards": dict(rewards), "question": _words(messages)}
        messages, kinds = self._with_paths(messages, where)
        modality = record.get("modality") or ("video" if "video" in kinds else "image" if "image" in kinds else "text")
        if modality not in MODALITIES:
            raise InputError(f"{where}: modality is {modality!r}; give one of {', '.join(MODALITIES)}")
        return Example(self.name, number, modality, tuple(messages), tuple(record.get("tools", ())), facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task`."""
        return await self._scores_of(example.facts["rewards"], example.name)(example, response)

    def _scores_of(self, rewards: Any, where: str) -> Composed:
        if not isinstance(rewards, Mapping) or not rewards:
            raise InputError(f"{where}: rewards are {rewards!r:.80}; name at least one, there or in the task's options")
        if not all(isinstance(weight, int | float) for weight in rewards.values()):
            raise InputError(f"{where}: rewards are {rewards!r:.80}; give a weight for each")
        key = tuple(rewards.items())
        if key not in self._composed:
            options = self.options.reward_options
            parts = [make_reward(name, options.get(name, {}), self._panel) for name in rewards]
            names = dict(zip(rewards, (part.name for part in parts), strict=True))
            self._composed[key] = compose(parts, {names[name]: float(weight) for name, weight in rewards.items()})
        return self._composed[key]

    def _with_paths(self, messages: list[dict[str, Any]], where: str) -> tuple[list[dict[str, Any]], set[str]]:
        """Messages whose media are found, and the kinds of media in them."""
        kinds = set()
        found = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                parts = []
                for part in content:
                    if not isinstance(part, dict):
                        raise InputError(f"{where}: part {part!r:.80}; give a table with its type")
                    kind = next((one for one in MEDIA if one in part), None)
                    kinds |= {str(part.get("type", "")).removesuffix("_url")} & set(MEDIA)
                    if kind is not None and isinstance(part[kind], str) and not part[kind].startswith(("data:", "/")):
                        part = part | {kind: str(self._folder / part[kind])}
                    parts.append(part)
                message = message | {"content": parts}
            found.append(message)
        return found, kinds


def _table(record: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = record.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} is {value!r:.80}; give a table")
    return value


def _add_known(facts: dict[str, Any]) -> None:
    """What rewards ask for, out of how `openkeye make-data` writes it: the asked label's boxes, the letter of a choice."""
    if "letter" in facts:
        facts.setdefault("choice", facts["letter"])
    if "boxes" not in facts and "label" in facts and isinstance(facts.get("instances"), list):
        facts["boxes"] = [one["box"] for one in facts["instances"] if one.get("label") == facts["label"]]


def _words(messages: list[dict[str, Any]]) -> str:
    """The user's words, for judges."""
    said = []
    for message in messages:
        content = message.get("content") if message["role"] == "user" else ""
        parts = content if isinstance(content, list) else [{"text": content}]
        said += [str(part["text"]) for part in parts if isinstance(part, dict) and part.get("text")]
    return "\n".join(said)
