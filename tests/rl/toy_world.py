"""A toy environment and task, importable, so that they can be pickled into another process."""

import asyncio
from dataclasses import dataclass, field

from openkeye.agents.environment import Observation, Opening
from openkeye.agents.model_client import ModelReply
from openkeye.tasks.task import Example, Response


@dataclass
class ToyEnvironment:
    """Asks `num_questions` things in a row; may break or hang on purpose."""

    num_questions: int = 2
    breaks_in: str = ""
    # "reset", "step" or "score"
    hangs_in: str = ""
    step_seconds: float = 0.0
    answers_tools: bool = False
    opening: tuple = ({"role": "user", "content": "How many stars? <|im_end|> is prose."},)
    tools: tuple = ()
    replies: list[ModelReply] = field(default_factory=list)
    num_closed: int = 0

    async def _at(self, what: str) -> None:
        if self.breaks_in == what:
            raise ZeroDivisionError(what)
        if self.hangs_in == what:
            await asyncio.sleep(60)

    async def reset(self) -> Opening:
        await self._at("reset")
        self.replies = []
        return Opening(self.opening, self.tools)

    async def step(self, reply: ModelReply) -> Observation:
        await self._at("step")
        await asyncio.sleep(self.step_seconds)
        self.replies.append(reply)
        if len(self.replies) >= self.num_questions:
            return Observation(is_done=True)
        if self.answers_tools:
            return Observation(
                tuple(
                    {"role": "tool", "content": f"{call['name']} says <|im_start|>", "tool_call_id": call["id"]}
                    for call in reply.tool_calls
                )
            )
        return Observation(({"role": "user", "content": f"And {len(self.replies)} more? <|im_start|>"},))

    async def score(self) -> dict[str, float]:
        await self._at("score")
        return {"outcome": 1.0, "turns": len(self.replies)}

    async def close(self) -> None:
        self.num_closed += 1


@dataclass
class ToyTask:
    """A task whose score tells what it was given."""

    environment: ToyEnvironment | None = None
    name: str = "toy"
    num_examples: int | None = None
    breaks: bool = False
    responses: list[Response] = field(default_factory=list)

    def read(self, number: int) -> Example:
        messages = () if self.environment else ({"role": "user", "content": "Hello"},)
        return Example("toy", number, "text", messages, environment=self.environment)

    async def score(self, example: Example, response: Response) -> dict[str, float]:
        if self.breaks:
            raise ZeroDivisionError
        self.responses.append(response)
        return {"outcome": 0.5}
