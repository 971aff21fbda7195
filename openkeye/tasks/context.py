"""Context-RL, first half (report, 5.4): a judge sees the verified reference solution; the reward is outcome x process.

A right answer by a wrong road, or by none, earns nothing. `judges.ProcessJudge` is a model in the judge's place; generated
arithmetic is checked by rules (`arithmetic_rules.RuleArithmeticJudge`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from openkeye.tasks.judges import ProcessVerdict
from openkeye.tasks.rewards.reading import answer_text, reasoning_text
from openkeye.tasks.rewards.reward import Reward, fact
from openkeye.tasks.task import Example, Response


class ContextJudge(Protocol):
    """Rules on the steps of a reasoning beside a verified solution."""

    async def judge(self, question: str, solution: str, reasoning: str, answer: str) -> ProcessVerdict: ...


@dataclass(frozen=True)
class ContextReward:
    """Outcome times process: "context" where both are whole, and both by name.

    The process is judged for wrong answers too where `judges_wrong_answers` is on: it costs calls and changes no reward, but
    tells how often the road was right and the answer was not.
    """

    outcome: Reward
    judge: ContextJudge
    is_strict: bool = True
    # the process is 1 for sound reasoning and else 0; off: the share of right steps, 0 where they do not lead to the answer
    judges_wrong_answers: bool = False
    name: str = "context"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        numbers = dict(await self.outcome(example, response))
        outcome = numbers[self.outcome.name]
        process = share = 0.0
        if outcome > 0 or self.judges_wrong_answers:
            question, solution = str(fact(example, "question")), str(fact(example, "solution"))
            reasoning, answer = reasoning_text(response), answer_text(response)
            verdict = await self.judge.judge(question, solution, reasoning, answer)
            share = verdict.share_right if verdict.leads_to_answer else 0.0
            process = float(verdict.is_sound) if self.is_strict else share
        right_by_wrong_road = float(outcome > 0 and process == 0)
        return {
            **numbers,
            self.name: outcome * process,
            "process": process,
            "process_share": share,
            "right_answer_wrong_reasoning": right_by_wrong_road,
        }
