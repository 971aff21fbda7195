"""The agent loop and its tools: budgets, wrong calls, results that are too long."""

import asyncio
from dataclasses import replace

import pytest

from openkeye.agents.loop import AgentBudget, run_agent
from openkeye.agents.model_client import ModelReply
from openkeye.agents.tool_environment import FixedTools, reply_of
from openkeye.agents.tools import Tool, ToolError, call_tool, cut, parameters
from openkeye.common.checks import InputError
from tests.agents.scripted import Scripted, call, say


async def _repeat(text: str, times: int = 1) -> str:
    if times == 13:
        raise ToolError("not thirteen times")
    return text * times


TIMES = {"type": "integer", "minimum": 1}
REPEAT = Tool("repeat", "Say it again.", parameters({"text": {"type": "string"}}, times=TIMES), _repeat)
QUESTION = {"role": "user", "content": "Repeat."}


def run(replies, budget: AgentBudget | None = None, **options):
    client = Scripted(replies)
    return client, asyncio.run(run_agent(client, FixedTools([QUESTION], [REPEAT], **options), budget))


def test_an_episode_until_the_answer():
    told = []
    client = Scripted([call("repeat", text="ab", times=2), say("It says abab.")])
    episode = asyncio.run(run_agent(client, FixedTools([QUESTION], [REPEAT]), on_message=told.append))
    assert [message["role"] for message in episode.transcript] == ["assistant", "tool", "assistant"]
    assert episode.transcript[1] == {"role": "tool", "tool_call_id": "call-repeat", "name": "repeat", "content": "abab"}
    assert (episode.answer, episode.finish, episode.num_turns) == ("It says abab.", "done", 2)
    assert client.seen_tools == ["repeat"] and told == list(episode.transcript) and episode.rewards["valid_calls"] == 1.0


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (call("reapet", text="a"), "there is no tool 'reapet'; choose from repeat"),
        (call("repeat"), "repeat: 'text' is a required property; it takes text, times"),
        (call("repeat", text=5), "text: 5 is not of type 'string'"),
        (call("repeat", text="a", times=0), "times: 0 is less than the minimum of 1"),
        (call("repeat", text="a", tiems=2), "'tiems' was unexpected"),
        (call("repeat", text="a", times=13), "not thirteen times"),
        (replace(say("x"), malformed=("<tool_call>{",)), "no tool call that can be read: <tool_call>{"),
    ],
)
def test_a_wrong_call_is_a_message_that_says_so(reply, words):
    _, episode = run([reply, say("sorry")])
    assert words in episode.transcript[1]["content"] and episode.transcript[1]["role"] == "tool"
    assert episode.finish == "done" and episode.rewards["valid_calls"] == 0.0


def forever(messages):
    return replace(call("repeat", text="a"), details={"num_tokens": 10})


@pytest.mark.parametrize(
    ("budget", "finish", "num_turns"),
    [
        (AgentBudget(num_turns=3), "turns", 3),
        (AgentBudget(num_tool_calls=2), "tool_calls", 3),
        (AgentBudget(num_tokens=35), "tokens", 4),
    ],
)
def test_budgets_end_an_episode(budget, finish, num_turns):
    _, episode = run(forever, budget)
    assert (episode.finish, episode.num_turns) == (finish, num_turns)


def test_an_environment_ends_by_its_own_turns_and_a_model_by_its_length():
    assert run(forever, max_turns=2)[1].finish == "done"
    assert run([replace(say("cut o"), finish_reason="length")])[1].finish == "length"


def test_seconds_end_a_tool_that_hangs_and_close_the_environment():
    closed = []

    async def hang() -> str:
        await asyncio.sleep(600)
        return ""

    class Closing(FixedTools):
        async def close(self) -> None:
            closed.append(True)

    environment = Closing([QUESTION], [Tool("hang", "", parameters({}), hang)])
    episode = asyncio.run(run_agent(Scripted([call("hang")]), environment, AgentBudget(seconds=0.2)))
    assert episode.finish == "seconds" and closed == [True] and episode.seconds < 5


def test_a_failing_tool_is_no_end_of_time():
    async def fail() -> str:
        raise TimeoutError("the server")

    environment = FixedTools([QUESTION], [Tool("fail", "", parameters({}), fail)])
    with pytest.raises(TimeoutError, match="the server"):
        asyncio.run(run_agent(Scripted([call("fail")]), environment, AgentBudget(seconds=60)))


def test_long_results_are_cut_with_a_notice():
    _, episode = run([call("repeat", text="ab", times=1000), say("")], AgentBudget(result_characters=60))
    content = episode.transcript[1]["content"]
    assert content == cut("ab" * 1000, 60) and "[... 1940 characters cut ...]" in content and len(content) < 100
    outcome = asyncio.run(call_tool([REPEAT], "repeat", {"text": "ab", "times": 1000}, 30))
    assert "1970 characters cut" in outcome.result and outcome.is_valid


def test_wrong_budgets_are_told():
    with pytest.raises(InputError, match="num_turns is 0"):
        AgentBudget(num_turns=0)
    with pytest.raises(InputError, match="0 turns"):
        FixedTools([QUESTION], [], max_turns=0)


def test_a_reply_comes_back_from_its_message():
    reply = ModelReply("text", "thought", ({"id": "1", "name": "repeat", "arguments": {"text": "a"}},))
    assert reply_of(reply.message()) == reply
    broken = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    assert reply_of(broken).malformed == ("{",)
