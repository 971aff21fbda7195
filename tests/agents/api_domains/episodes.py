"""Episodes for tests: playing a list of calls, and the reference solution as such a list."""

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any

from openkeye.agents.api_domains.environment import ApiEnvironment, make_environment
from openkeye.agents.api_domains.goal_kinds import KINDS
from openkeye.agents.api_domains.naming import tool_key
from openkeye.agents.api_domains.schema import Domain
from openkeye.agents.model_client import ModelReply

Step = tuple[str, dict[str, Any]] | str
# (action, arguments) in the domain's own names, or what is said at the end of a turn


def make(domain: Domain, seed: str, num_calls: int, **options: Any) -> ApiEnvironment:
    kinds = options.pop("kinds", tuple(KINDS))
    return make_environment(domain, seed, num_calls, kinds, options.pop("num_distractors", 3), **options)


def reference(world: ApiEnvironment) -> list[Step]:
    steps: list[Step] = []
    for turn in world.goal.turns:
        steps += [(call.action, dict(call.arguments)) for call in turn.calls]
        steps.append(turn.last_words)
    return steps


def reply_of(world: ApiEnvironment, step: Step) -> ModelReply:
    if isinstance(step, str):
        return ModelReply(step)
    action, arguments = step
    key = tool_key(world.worlds[0], world.worlds[0].actions[action])
    shown = {world.naming.arguments[key][name]: value for name, value in arguments.items()}
    return ModelReply("", tool_calls=({"id": "c", "name": world.naming.tools[key], "arguments": shown},))


async def play_async(world: ApiEnvironment, steps: Sequence[Step], is_pickled: bool = False) -> dict[str, float]:
    await world.reset()
    for step in steps:
        if is_pickled:
            world = pickle.loads(pickle.dumps(world))
        await world.step(reply_of(world, step))
    return dict(await world.score())


def play(world: ApiEnvironment, steps: Sequence[Step], is_pickled: bool = False) -> dict[str, float]:
    """Rewards after these steps from the start."""
    return asyncio.run(play_async(world, steps, is_pickled))
