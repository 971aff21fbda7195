"""Episodes: the policy's own ids, the template's text between them, a world that may break, and going on after a kill."""

import asyncio
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.engine import loop
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.inputs.template import ChatTemplate
from openkeye.rl.episode import EpisodeInterrupted, EpisodeLimits, EpisodeState, run_episode
from openkeye.rl.rollout import RolloutId
from tests.engine.test_loop import QUESTIONS, chat
from tests.rl.test_policy_engine import EXACT, with_policy
from tests.rl.toy_world import ToyEnvironment, ToyTask

GREEDY = SamplingParameters(temperature=0.0)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def id_of(member: int) -> RolloutId:
    return RolloutId("toy", 0, 0, member)


def rendered(engine: Engine, messages: list[dict], **options) -> list[int]:
    """Ids of a whole conversation, as the template writes it."""
    pieces = engine.processor.template.render(messages, True, **options)
    read = engine.processor.encode_text, engine.processor.tokenizer.encode_template
    return [token for text, is_prose in pieces for token in read[not is_prose](text)]


def test_an_episode_is_what_the_template_renders_and_only_the_policy_is_learnt(video):
    engine = Engine(config=EngineConfig(records_routes=True))
    opening = tuple(chat(video, QUESTIONS[0]))
    task, states = ToyTask(ToyEnvironment(3, opening=opening)), []

    async def work(policy):
        prompt = await policy.lay_out(opening)
        return prompt, await run_episode(policy, task, task.read(0), id_of(0), states.append, sampling=GREEDY)

    prompt, rollout = with_policy(engine, work)
    said = [rollout.output_ids[part] for part in runs(rollout.is_policy)]
    texts = [engine.processor.decode(ids[:-1].tolist()) for ids in said]
    assert len(said) == 3 and all(
        engine.processor.encode_text(text) == ids[:-1].tolist() for text, ids in zip(texts, said, strict=True)
    )
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTIONS[0]}]}]
    for number, text in enumerate(texts):
        messages.append({"role": "assistant", "content": text})
        if number < 2:
            messages.append({"role": "user", "content": f"And {number + 1} more? <|im_start|>"})
    whole = rendered(engine, messages)
    first = len(prompt.template_ids)
    # Behind the last end token the template goes on, and nobody has said that.
    assert whole[:first] == list(prompt.template_ids)
    assert whole[first : first + len(rollout.output_ids)] == rollout.output_ids.tolist()
    assert (rollout.prompt_ids == prompt.model_input.input_ids.numpy()).all()
    masked = ~rollout.is_policy
    assert masked.any() and (rollout.versions[masked] == -1).all() and (rollout.logprobs[masked] == 0).all()
    assert (rollout.versions[~masked] == 0).all() and (rollout.logprobs[~masked] <= 0).all()
    assert rollout.finish_reason == "stop" and rollout.rewards == {"outcome": 1.0, "turns": 3.0} and rollout.text == texts[-1]
    assert (rollout.routes[:-1] >= 0).all() and (rollout.routes[-1] == -1).all()
    assert [state.num_turns for state in states] == [1, 2]
    # The task's own world has seen nothing.
    assert task.environment.replies == [] and task.environment.num_closed == 0


def runs(mask: np.ndarray) -> list[slice]:
    """Where it is true in a row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [slice(*edges[number : number + 2]) for number in range(0, len(edges), 2)]


def test_tools_are_called_and_what_they_say_is_masked(monkeypatch):
    engine = Engine()
    engine.processor = replace(
        engine.processor, template=ChatTemplate(TOOL_TEMPLATE, sorted(engine.processor.tokenizer.special_tokens))
    )
    call = '\n<tool_call>\n{"name": "look", "arguments": {"at": "stars"}}\n</tool_call>'
    texts = ["Hm." + call + call, "<tool_call>\nlook!\n</tool_call> Three."]
    script = [token for text in texts for token in [*engine.processor.encode_text(text), 2]]
    monkeypatch.setattr(loop, "sample_batch", lambda *_: [script.pop(0)])
    world = ToyEnvironment(2, answers_tools=True, tools=(TOOL,))
    task, seen = ToyTask(world), []

    async def work(policy):
        return await run_episode(policy, task, task.read(0), id_of(0), seen.append)

    rollout = with_policy(engine, work)
    (state,) = seen
    first, second = pickle.loads(state.environment).replies[0], rollout.text
    assert [(one["id"], one["name"], one["arguments"]) for one in first.tool_calls] == [
        ("call_0", "look", {"at": "stars"}),
        ("call_1", "look", {"at": "stars"}),
    ]
    assert first.text == "Hm." and first.finish_reason == "tool_calls" and second == texts[1]
    tools = [{"role": "tool", "content": "look says <|im_start|>", "tool_call_id": f"call_{n}"} for n in range(2)]
    messages = [*world.opening, {**first.message()}, *tools, {"role": "assistant", "content": texts[1]}]
    whole = rendered(engine, messages, tools=[TOOL])
    known = rollout.prompt_ids.tolist() + rollout.output_ids.tolist()
    assert whole[: len(known)] == known
    told = engine.processor.decode(rollout.output_ids[~rollout.is_policy].tolist(), skip_special_tokens=False)
    assert told.startswith("\n<|im_start|>user") and told.count("look says") == 2 and told.endswith("assistant\n")
    assert not script


def test_a_template_without_a_place_for_tools_is_refused():
    task = ToyTask(ToyEnvironment(tools=(TOOL,)))
    with pytest.raises(InputError, match="no place for tools"):
        with_policy(Engine(), lambda policy: run_episode(policy, task, task.read(0), id_of(0)))


def test_a_single_answer_is_scored_by_its_task():
    task = ToyTask()
    rollout = with_policy(Engine(), lambda policy: run_episode(policy, task, task.read(0), id_of(0), sampling=GREEDY))
    (response,) = task.responses
    assert rollout.rewards == {"outcome": 0.5} and rollout.finish_reason == response.finish_reason == "stop"
    assert response.text == rollout.text and response.num_tokens == rollout.num_policy_tokens == len(rollout.output_ids)


@pytest.mark.parametrize("how", ["breaks_in", "hangs_in"])
def test_a_world_that_breaks_or_hangs_costs_its_own_rollout_alone(how):
    limits = EpisodeLimits(step_seconds=0.3, score_seconds=0.3)
    worlds = [ToyEnvironment(2, **{how: what}) for what in ("reset", "step", "score")]
    tasks = [*(ToyTask(world) for world in worlds), ToyTask(breaks=True), ToyTask()]

    async def work(policy):
        named = list(enumerate(tasks))
        begun = [run_episode(policy, task, task.read(0), id_of(n), limits=limits, sampling=GREEDY) for n, task in named]
        return await asyncio.gather(*begun)

    *bad, good = with_policy(Engine(), work)
    assert [(rollout.finish_reason, dict(rollout.rewards)) for rollout in bad] == [("failed", {})] * 4
    assert [bool(len(rollout.output_ids)) for rollout in bad] == [False, True, True, True]
    assert good.finish_reason == "stop" and good.rewards == {"outcome": 0.5}


def test_budgets_end_an_episode():
    task = ToyTask(ToyEnvironment(9))

    async def work(policy):
        async def under(**limits):
            limits = EpisodeLimits(**limits)
            return await run_episode(policy, task, task.read(0), id_of(0), limits=limits, sampling=GREEDY)

        free = await under(max_turns=3)
        return free, await under(max_turn_tokens=2), await under(max_tokens=len(free.output_ids) - 1), await under(max_turns=1)

    free, turn, tokens, turns = with_policy(Engine(), work)
    assert {rollout.finish_reason for rollout in (free, turn, tokens, turns)} == {"length"}
    assert free.rewards["turns"] == 3 and turns.rewards["turns"] == 1
    assert len(turn.output_ids) == 2 and turn.rewards["turns"] == 0
    assert len(tokens.output_ids) <= len(free.output_ids) - 1
    assert (tokens.output_ids == free.output_ids[: len(tokens.output_ids)]).all()


def test_an_episode_goes_on_after_its_process_was_killed(tmp_path):
    path = tmp_path / "state"
    command = [sys.executable, "-m", "tests.rl.killed_episode", str(path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    state = pickle.loads(path.read_bytes())
    task = ToyTask(ToyEnvironment(3))

    async def work(policy):
        resumed = await run_episode(policy, task, task.read(0), id_of(0), state=state)
        return resumed, await run_episode(policy, task, task.read(0), id_of(0))

    resumed, whole = with_policy(Engine(config=EXACT), work)
    assert state.num_turns == 1 < whole.rewards["turns"]
    same_rollout(resumed, whole)


def same_rollout(one, other) -> None:
    assert one.rewards == other.rewards and one.finish_reason == other.finish_reason and one.text == other.text
    for name in ("prompt_ids", "output_ids", "is_policy", "logprobs", "versions"):
        assert (getattr(one, name) == getattr(other, name)).all(), name


def test_an_episode_that_is_interrupted_again_and_again_ends_as_if_nothing_had_been():
    task = ToyTask(ToyEnvironment(3))

    async def whole(policy):
        return await run_episode(policy, task, task.read(0), id_of(0))

    async def cut(policy):
        state, partials = None, []
        while True:
            episode = asyncio.ensure_future(run_episode(policy, task, task.read(0), id_of(0), state=state))
            # Longer each time: on a busy machine the first ones may pass before a token is there.
            await asyncio.wait([episode], timeout=0.02 * 1.3 ** len(partials))
            await policy.interrupt()
            try:
                return await episode, partials
            except EpisodeInterrupted as interrupted:
                state = pickle.loads(pickle.dumps(interrupted.state))
                partials.append(state.partial)

    rollout, partials = with_policy(Engine(config=EXACT), cut)
    assert any(len(partial.ids) for partial in partials)
    same_rollout(rollout, with_policy(Engine(config=EXACT), whole))


def test_an_interruption_while_the_environment_acts_is_heeded_before_the_next_turn():
    task, states = ToyTask(ToyEnvironment(3, step_seconds=0.5)), []

    async def work(policy):
        episode = asyncio.ensure_future(run_episode(policy, task, task.read(0), id_of(0), states.append, sampling=GREEDY))
        while not states:
            await asyncio.sleep(0.01)
        # Its second turn ends, or has ended, and the environment acts.
        await asyncio.sleep(0.2)
        partials = await policy.interrupt()
        with pytest.raises(EpisodeInterrupted) as interrupted:
            await episode
        state = interrupted.value.state
        assert (state.partial is None) is (partials == {})
        assert state.num_tokens >= len(states[0].output_ids) and state.oldest_version == 0
        rollout = await run_episode(policy, task, task.read(0), id_of(0), sampling=GREEDY, state=state)
        return rollout, await run_episode(policy, task, task.read(0), id_of(0), sampling=GREEDY)

    same_rollout(*with_policy(Engine(config=EXACT), work))
    assert EpisodeState(id_of(0)).oldest_version is None
