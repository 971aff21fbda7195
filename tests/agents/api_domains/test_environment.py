"""Episodes as a model lives them: what it is shown, what it is told, and what it is paid."""

import asyncio
import json
import re
from collections.abc import Sequence

import pytest

from openkeye.agents.api_domains.catalogue import domains
from openkeye.agents.api_domains.database import changes
from openkeye.agents.api_domains.environment import ApiEnvironment, reference_conversation, with_calls_of_text
from openkeye.agents.api_domains.goal_kinds import KINDS
from openkeye.agents.api_domains.goals import NoGoal
from openkeye.agents.api_domains.naming import tool_key
from openkeye.agents.api_domains.scoring import is_answer
from openkeye.agents.model_client import ModelReply
from tests.agents.api_domains.episodes import make, play, reference, reply_of

WORLDS = list(domains().values())


def make_kind(kind: str, num_calls: int, number: int = 0, **options) -> ApiEnvironment:
    """The first world from `number` on that has such a goal."""
    for domain in WORLDS[number:]:
        try:
            world = make(domain, f"{kind} {domain.name}", num_calls, kinds=(kind,), **options)
        except NoGoal:
            continue
        if world.goal.kind == kind:
            return world
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_goal_is_had_and_passes(kind):
    for num_calls in (1, 2, 3, 5):
        if num_calls == 1 and kind in ("compare", "condition", "recover", "follow"):
            continue
        if num_calls > 1 and kind == "find":
            continue
        if num_calls > 3 and kind == "read":
            continue
        world = make_kind(kind, num_calls, 7)
        assert len(world.goal.calls) == num_calls
        assert play(world, reference(world))["outcome"] == 1


def test_a_schema_is_one_that_chat_apis_take():
    for number, domain in enumerate(WORLDS):
        world = make(domain, "schema", 2, num_distractors=99, decoy=WORLDS[number - 1], is_renamed=number % 2 == 0)
        tools = [tool["function"] for tool in world.opening().tools]
        names = [tool["name"] for tool in tools]
        assert len(set(names)) == len(names) == len(domain.actions) + len(WORLDS[number - 1].actions)
        for tool in tools:
            assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool["name"]), tool["name"]
            properties = tool["parameters"]["properties"]
            assert all(re.fullmatch(r"[a-zA-Z0-9_]+", name) for name in properties), properties
            assert set(tool["parameters"]["required"]) <= set(properties)
        assert json.loads(json.dumps(tools)) == tools


def test_two_episodes_share_few_names_and_none_that_only_memory_knows():
    first, second = (make(WORLDS[0], seed, 1, num_distractors=99) for seed in ("a", "b"))
    shared = set(first.naming.tools.values()) & set(second.naming.tools.values())
    assert len(shared) <= 2
    plain, again = (make(WORLDS[0], seed, 1, num_distractors=99, is_plain=True) for seed in ("c", "d"))
    for name in ("room", "price", "stay"):
        assert plain.naming.labels["hotel"][name] != again.naming.labels["hotel"][name]
    assert not set(plain.naming.labels["hotel"].values()) & set(WORLDS[0].entities)
    own = make(WORLDS[0], "a", 1, is_renamed=False)
    assert all(own.naming.tools[tool_key(WORLDS[0], action)] == action.name for action in WORLDS[0].actions.values())


def test_wrong_calls_are_observations():
    world = make_kind("act", 1)

    async def run() -> None:
        await world.reset()
        before = world.databases[0].copy()
        name = next(iter(world.opening().tools))["function"]["name"]
        calls = (
            {"id": "1", "name": "no_such_tool", "arguments": {}},
            {"id": "2", "name": name, "arguments": "id=3"},
            {"id": "3", "name": name, "arguments": {"colour": "red"}},
            {"id": "4", "name": name, "arguments": {}},
        )
        observation = await world.step(ModelReply("", tool_calls=calls))
        texts = [message["content"] for message in observation.messages]
        assert [message["tool_call_id"] for message in observation.messages] == ["1", "2", "3", "4"]
        for text, words in zip(texts, ("there is no tool", "JSON object", "no argument colour", "missing"), strict=True):
            assert words in json.loads(text)["error"], text
        observation = await world.step(ModelReply("", malformed=("{name: x",)))
        assert "cannot be read" in observation.messages[0]["content"] and not observation.is_done
        assert world.databases[0] == before
        rewards = await world.score()
        assert rewards["call_validity"] == 0 and rewards["excess_calls"] == 4

    asyncio.run(run())


def test_a_forgotten_word_is_told_when_asked_and_cannot_be_known_before():
    world = make_kind("ask", 1, 3)

    async def run() -> None:
        await world.reset()
        observation = await world.step(ModelReply("Which one?"))
        assert [message["role"] for message in observation.messages] == ["user"] and not observation.is_done
        assert observation.messages[0]["content"] == world.goal.turns[1].request
        await world.step(reply_of(world, reference(world)[1]))
        assert (await world.step(ModelReply("done"))).is_done
        assert (await world.score())["outcome"] == 1

    asyncio.run(run())
    told = world.goal.turns[1].request.removesuffix(".").split(" is ")[-1]
    assert not re.search(rf"\b{re.escape(told)}\b", world.goal.turns[0].request)


def test_what_another_world_suffers_counts():
    world = make(WORLDS[3], "decoy", 1, num_distractors=99, decoy=WORLDS[4], kinds=("act",))
    assert play(world, reference(world))["outcome"] == 1

    async def run() -> float:
        await world.reset()
        for step in reference(world):
            await world.step(reply_of(world, step))
        decoy = world.databases[1]
        table = next(iter(decoy.tables.values()))
        del table[next(iter(table))]
        assert changes(world.firsts[1], decoy)
        return (await world.score())["outcome"]

    assert asyncio.run(run()) == 0


def test_an_episode_ends():
    world = make_kind("act", 2)

    async def run(replies: Sequence[ModelReply]) -> int:
        await world.reset()
        for number, reply in enumerate(replies):
            if (await world.step(reply)).is_done:
                return number + 1
        raise AssertionError("no end")

    nonsense = ModelReply("", tool_calls=({"id": "1", "name": "x", "arguments": {}},))
    assert asyncio.run(run([nonsense] * 99)) == 2 * 3 + 4
    many = ModelReply("", tool_calls=nonsense.tool_calls * 5000)
    assert asyncio.run(run([many])) == 1
    assert len(world.calls) == 2 * 3 + 4


def test_calls_in_text_are_read():
    reply = with_calls_of_text(ModelReply('I see. <tool_call>\n{"name": "a", "arguments": {"b": 1}}\n</tool_call>'))
    assert reply.text == "I see."
    assert reply.tool_calls == ({"id": "call_0", "name": "a", "arguments": {"b": 1}},)
    for text in (
        "<tool_call>{",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 9999,
    ):
        reply = with_calls_of_text(ModelReply(text))
        assert len(reply.malformed) == 1 and not reply.tool_calls and not reply.text


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_reference_conversation_can_be_acted_out(is_plain):
    for number in (0, 40, 90, 150):
        world = make(WORLDS[number], f"talk {number}", 3, is_plain=is_plain)
        messages, tools = reference_conversation(world)
        assert bool(tools) != is_plain

        async def run(world: ApiEnvironment, messages: list) -> float:
            heard = list((await world.reset()).messages)
            for message in [message for message in messages if message["role"] == "assistant"]:
                calls = tuple({"id": call["id"], **call["function"]} for call in message.get("tool_calls", ()))
                heard.append(message)
                heard += (await world.step(ModelReply(message["content"], tool_calls=calls))).messages
            # What the tools say in it is what they say.
            assert [message["content"] for message in heard] == [message["content"] for message in messages]
            return (await world.score())["outcome"]

        assert asyncio.run(run(world, messages)) == 1
        assert not world.answers or world.answers[-1] == messages[-1]["content"]


@pytest.mark.parametrize(
    ("text", "truth", "is_right"),
    [
        ("80", "80", True),
        ("80.", "80", True),
        ("Answer: 80.0", "80", True),
        ("12.5", "12.50", True),
        ("Red Lamp", "red lamp", True),
        ("80 or 90", "80", False),
        ("it is 80", "80", False),
        ("r10", "r1", False),
        ("", "80", False),
        ("refused done", "done", False),
    ],
)
def test_an_answer_is_the_value_alone(text, truth, is_right):
    assert is_answer(text, truth) is is_right


def test_a_judge_sees_the_changes_and_its_yes_counts():
    class Judge:
        name = "stand-in"
        asked = ""

        def __init__(self, says: str) -> None:
            self.says = says

        async def reply(self, messages, tools=()):
            self.asked = messages[0]["content"]
            return ModelReply(self.says)

    world = make_kind("act", 2)

    async def run(says: str) -> tuple[float, str]:
        await world.reset()
        for step in reference(world):
            await world.step(reply_of(world, step))
        judge = Judge(says)
        return await world.judge(judge), judge.asked

    score, asked = asyncio.run(run("Yes, it does."))
    assert score == 1 and world.goal.turns[0].request in asked
    assert all(str(value) in asked for *_, value in changes(world.firsts[0], world.wanted()))
    assert asyncio.run(run("no"))[0] == asyncio.run(run("I cannot say yes"))[0] == 0
