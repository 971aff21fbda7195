"""The tasks of a run, and their prompts as the engine laid them out: read again from numbers wherever they are needed."""

import asyncio

from openkeye.agents.environment import Environment, Opening
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.rl.policy_engine import lay_out_prompt
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Example, Task


def open_tasks(config: PostTrainingConfig) -> dict[str, Task]:
    """The tasks of a run, those of its evaluation among them, by their names in the run.

    Raises:
        InputError: no such task or option.
    """
    named = {**config.evaluation_tasks, **config.tasks}
    return {name: open_task(task.reader, task.options) for name, task in named.items()}


def prompt_of(example: Example, processor: Processor) -> Prompt:
    """An example's prompt; on a thread without an event loop."""
    if example.environment is None:
        return lay_out_prompt(example.messages, processor, example.tools)
    opening = asyncio.run(_opening(example.environment))
    return lay_out_prompt(opening.messages, processor, opening.tools)


async def _opening(environment: Environment) -> Opening:
    try:
        return await environment.reset()
    finally:
        await environment.close()
