"""Tool use in simulated services: the worlds of `openkeye.agents.api_domains` as a task."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from openkeye.agents.api_domains import environment as episodes
from openkeye.agents.api_domains.catalogue import SPLITS, split
from openkeye.agents.api_domains.environment import ApiEnvironment, make_environment
from openkeye.agents.api_domains.goal_kinds import KINDS, MAX_CALLS
from openkeye.agents.api_domains.goals import NoGoal
from openkeye.agents.model_client import Message, ModelClient, ModelReply
from openkeye.common.checks import InputError
from openkeye.tasks.task import Example, Response

WORDINGS = ("plain", "full")
NUM_TRIES = 20
# seeds for one example, since a world cannot have every goal in every state
LEVELS: Mapping[int, Mapping[str, Any]] = {
    1: {"min_calls": 1, "max_calls": 1, "num_distractors": 0, "kinds": ("act",)},
    2: {"min_calls": 1, "max_calls": 1, "num_distractors": 2, "kinds": ("act", "read", "find", "total")},
    3: {"min_calls": 1, "max_calls": 2, "num_distractors": 2},
    4: {"min_calls": 2, "max_calls": 3, "num_distractors": 4},
    5: {"min_calls": 3, "max_calls": 5, "num_distractors": 12, "has_decoys": True},
}


@dataclass(frozen=True)
class ApiCalls:
    """Fulfils `Task`. Example n is of world n modulo the number of worlds in the split; the rest of n is its seed.

    Raises:
        InputError: a setting is out of its choices.
    """

    split: str = "train"
    # of catalogue.SPLITS; training and held-out examples share no world
    min_calls: int = 1
    max_calls: int = 3
    # of the reference solution, 1 to 5
    kinds: tuple[str, ...] = tuple(KINDS)
    # goals that cannot be had with a number of calls become plain actions
    num_distractors: int = 4
    # tools beside those that are needed
    has_decoys: bool = False
    # whether another world's tools are among them, once the world's own are all shown
    wording: str = "full"
    # "plain": short and regular sentences of few words, tools in the prompt's text; "full": JSON schemas
    is_renamed: bool = True
    # tools, arguments, tables and fields have other names in every example
    seed: int = 0
    level: int = 0
    # of LEVELS, 1 to 5, whose values then replace those of the fields that it names; 0: each field's own
    judge: ModelClient | None = None
    # adds the reward "judge": what it says of the final state

    def __post_init__(self) -> None:
        if self.level:
            if self.level not in LEVELS:
                raise InputError(f"api_calls: level is {self.level!r}; give one of {', '.join(map(str, LEVELS))}")
            for name, value in LEVELS[self.level].items():
                object.__setattr__(self, name, value)
        if self.split not in SPLITS:
            raise InputError(f"api_calls: split is {self.split!r}; give one of {', '.join(SPLITS)}")
        if self.wording not in WORDINGS:
            raise InputError(f"api_calls: wording is {self.wording!r}; give one of {', '.join(WORDINGS)}")
        if not 1 <= self.min_calls <= self.max_calls <= MAX_CALLS:
            raise InputError(
                f"api_calls: {self.min_calls} to {self.max_calls} calls; give min_calls and max_calls from 1 to {MAX_CALLS}"
            )
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise InputError(f"api_calls: kinds {self.kinds!r}; give some of {', '.join(KINDS)}")
        if self.num_distractors < 0:
            raise InputError(f"api_calls: num_distractors is {self.num_distractors}; give a number from 0 on")

    @property
    def name(self) -> str:
        return "api_calls"

    @property
    def num_examples(self) -> int | None:
        """There is no end of seeds."""
        return None

    def read(self, number: int) -> Example:
        """The example of a number; the same in every process."""
        made = self._environment(number)
        facts = {
            "domain": made.worlds[0].name,
            "kind": made.goal.kind,
            "num_calls": len(made.goal.calls),
            "reference": [{"action": call.action, "arguments": dict(call.arguments)} for call in made.goal.calls],
        }
        return Example(self.name, number, "text", (), facts=facts, environment=made)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """Rewards of the transcript, acted out once more on the example's first state (`scoring.rewards`)."""
        world = self._environment(example.number)
        await world.reset()
        for reply in _replies(response):
            if (await world.step(reply)).is_done:
                break
        rewards = dict(await world.score())
        if self.judge is not None:
            rewards["judge"] = await world.judge(self.judge)
        return rewards

    def _environment(self, number: int) -> ApiEnvironment:
        worlds = split(self.split)
        domain = worlds[number % len(worlds)]
        for attempt in range(NUM_TRIES):
            seed = f"{self.seed} {number} {attempt}"
            rng = Random(f"{seed} {domain.name}")
            num_calls = rng.randint(self.min_calls, self.max_calls)
            decoy = rng.choice([other for other in worlds if other is not domain]) if self.has_decoys else None
            try:
                return make_environment(
                    domain,
                    f"{seed} {domain.name}",
                    num_calls,
                    self.kinds,
                    self.num_distractors,
                    decoy,
                    self.is_renamed,
                    self.wording == "plain",
                )
            except NoGoal:
                continue
        raise AssertionError(f"{domain.name}: no goal in {NUM_TRIES} states of the world")


def reference_conversation(example: Example) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages of the reference solution with its tools' results, tools) of an `ApiCalls` example, for imitation."""
    assert isinstance(example.environment, ApiEnvironment)
    return episodes.reference_conversation(example.environment)


def reference_conversations(
    task: ApiCalls, numbers: Sequence[int]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages, tools) of many examples, one by one."""
    for number in numbers:
        yield reference_conversation(task.read(number))


def _replies(response: Response) -> Iterator[ModelReply]:
    """The model's turns of a transcript; of an answer without one, the answer."""
    spoken = [message for message in response.transcript if message["role"] == "assistant"]
    if not spoken:
        yield ModelReply(response.text)
    for message in spoken:
        yield _reply(message)


def _reply(message: Message) -> ModelReply:
    calls = [
        {"id": call.get("id", ""), "name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in message.get("tool_calls") or ()
    ]
    content = message.get("content") or ""
    return ModelReply(content if isinstance(content, str) else "", tool_calls=tuple(calls))
