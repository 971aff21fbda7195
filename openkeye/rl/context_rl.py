"""Context-RL, second half: groups in which every rollout failed are asked again with a mistake report in the prompt.

The report does not hold the answer (`tasks.mistake_reports`). Retries that succeed join the group. They are learnt in one of
two ways, which is recorded with the group and never mixed within one:

- "report": on the prompt with the report, on which they were sampled: on-policy.
- "bare": on the question alone. Their log-probabilities stay those under which they were sampled, so that the policy loss'
  ratio is the importance weight between the bare prompt and the one with the report.

A question with two possible answers is given away by any report, since it says that one of them is wrong: there the reward by
which retries succeed should be "context".

Letters: T tokens behind the prompt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from openkeye.agents.model_client import Message
from openkeye.common.checks import InputError
from openkeye.rl.roles import AskedAgain
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.tasks.mistake_reports import Attempt, MistakeReporter, checked_report
from openkeye.tasks.rewards.reading import answer_text, reasoning_text
from openkeye.tasks.task import Example, Response

TRAINED_ON = ("report", "bare")
RETRY_PROMPT = "The answer is wrong. {} Solve it again."
Ask = Callable[[Example, RolloutId], Awaitable[Rollout]]
# a rollout of the policy on an example's messages, with its rewards


@dataclass(frozen=True)
class RecoverySettings:
    """Whether and how failed groups are asked again."""

    is_on: bool = False
    trained_on: str = "report"
    # of TRAINED_ON
    num_retries: int = 4
    # of a group; each about another attempt as long as there are some
    max_joined: int = 2
    # successes that join the group
    reward: str = "outcome"
    # by which a rollout has failed or not; "context" where right answers by wrong roads are failures
    success: float = 1.0
    # from which it has not
    shows_attempt: bool = True
    # the attempt stands before the report, as a turn of its own
    max_reports: int = 4
    # tries of the reporter until a report does not hold the answer

    def __post_init__(self) -> None:
        if self.trained_on not in TRAINED_ON:
            raise InputError(f"recovered rollouts are trained on {self.trained_on!r}; give one of {', '.join(TRAINED_ON)}")
        for name in ("num_retries", "max_joined", "max_reports"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the recovery is {getattr(self, name)}; give 1 or more")


@dataclass(frozen=True)
class RecoveredGroup:
    """A group after recovery, whether or not there was any."""

    rollouts: tuple[Rollout, ...]
    # the group's own, then those that joined
    trained_on: str
    # of TRAINED_ON: how those that joined are learnt
    reports: Mapping[int, str] = field(default_factory=dict)
    # by member of those that joined: what stood in their prompt
    num_retries: int = 0
    num_succeeded: int = 0
    num_refused_reports: int = 0

    def __post_init__(self) -> None:
        own = [rollout for rollout in self.rollouts if rollout.id.member not in self.reports]
        for rollout in self.rollouts:
            if rollout.id.member in self.reports:
                is_bare = np.array_equal(rollout.prompt_ids, own[0].prompt_ids)
                if is_bare != (self.trained_on == "bare"):
                    raise ValueError(f"{rollout.id}: joined on another prompt than {self.trained_on!r} says")

    @property
    def num_joined(self) -> int:
        return len(self.reports)


def has_failed(group: Sequence[Rollout], settings: RecoverySettings) -> bool:
    """Whether no rollout of a group succeeded, though at least one was an answer."""
    answers = [rollout for rollout in group if rollout.finish_reason != "failed"]
    return bool(answers) and not any(is_success(rollout.rewards, settings) for rollout in answers)


def is_success(rewards: Mapping[str, float], settings: RecoverySettings) -> bool:
    """Whether these are the rewards of a rollout that has not failed.

    Raises:
        InputError: the reward that tells is not among them.
    """
    if settings.reward not in rewards:
        raise InputError(
            f"recovery.reward is {settings.reward!r}, and a rollout has {', '.join(rewards) or 'none'}; name one that it has"
        )
    return rewards[settings.reward] >= settings.success


def with_report(example: Example, again: AskedAgain, shows_attempt: bool) -> Example:
    """The example asked again: the attempt and the report as turns, or the report behind the question alone."""
    words = RETRY_PROMPT.format(again.report)
    if shows_attempt:
        turns: tuple[Message, ...] = ({"role": "assistant", "content": again.attempt}, {"role": "user", "content": words})
        return replace(example, messages=(*example.messages, *turns))
    *others, last = example.messages
    content = last["content"]
    more = f"{content}\n{words}" if isinstance(content, str) else [*content, {"type": "text", "text": f"\n{words}"}]
    return replace(example, messages=(*others, {**last, "content": more}))


def on_bare_prompt(rollout: Rollout, prompt_ids: np.ndarray) -> Rollout:
    """The same answer behind the bare prompt. What was chosen in another context is not replayed or compared."""
    return replace(rollout, prompt_ids=prompt_ids, routes=None, picks=None)


def importance_weights(
    bare_logprobs_T: np.ndarray, behaviour_logprobs_T: np.ndarray, is_policy_T: np.ndarray, cap: float
) -> np.ndarray:
    """Truncated weights of tokens that were sampled with the report and are learnt without it: min(ratio, cap), float32 [T].

    1 for tokens that were not sampled.
    """
    gap = np.where(is_policy_T, bare_logprobs_T.astype(np.float64) - behaviour_logprobs_T, 0.0)
    return np.exp(np.minimum(gap, np.log(cap))).astype(np.float32)


async def recover(
    group: Sequence[Rollout], example: Example, reporter: MistakeReporter, ask: Ask, settings: RecoverySettings
) -> RecoveredGroup:
    """Ask a failed group again, and let what succeeds join it. Any other group, and every one while it is off, stays as it is.

    Args:
        group: finished and scored rollouts of one example on one prompt.
        ask: samples and scores the policy on an example that holds a report.
    """
    if not settings.is_on or not has_failed(group, settings):
        return RecoveredGroup(tuple(group), settings.trained_on)
    chosen, num_refused = await reports_on(group, example, reporter, settings)
    if not chosen:
        return RecoveredGroup(tuple(group), settings.trained_on, num_refused_reports=num_refused)
    first = max(rollout.id.member for rollout in group) + 1
    retries = await asyncio.gather(
        *(
            ask(with_report(example, again, settings.shows_attempt), replace(group[0].id, member=first + n))
            for n, again in enumerate(chosen)
        )
    )
    succeeded = [retry for retry in retries if retry.finish_reason != "failed" and is_success(retry.rewards, settings)]
    joined = [as_learnt(retry, group[0].prompt_ids, settings) for retry in succeeded[: settings.max_joined]]
    reports = {retry.id.member: chosen[retry.id.member - first].report for retry in joined}
    return RecoveredGroup((*group, *joined), settings.trained_on, reports, settings.num_retries, len(succeeded), num_refused)


async def reports_on(
    group: Sequence[Rollout], example: Example, reporter: MistakeReporter, settings: RecoverySettings
) -> tuple[list[AskedAgain], int]:
    """(`num_retries` attempts of a failed group with reports, which come again where there are fewer; reports refused).

    No attempts where none could be reported on without the answer.
    """
    attempts = [rollout for rollout in group if rollout.finish_reason != "failed"][: settings.num_retries]
    checked = await asyncio.gather(
        *(checked_report(reporter, example, _attempt(rollout), settings.max_reports) for rollout in attempts)
    )
    told = [AskedAgain(one.text, check.text) for one, check in zip(attempts, checked, strict=True) if check.text is not None]
    chosen = [told[number % len(told)] for number in range(settings.num_retries)] if told else []
    return chosen, sum(check.num_refused for check in checked)


def as_learnt(retry: Rollout, bare_prompt_ids: np.ndarray, settings: RecoverySettings) -> Rollout:
    """A success as it joins its group."""
    is_bare = settings.trained_on == "bare"
    rewards = {**retry.rewards, "recovered": 1.0, "recovered_on_bare_prompt": float(is_bare)}
    retry = replace(retry, rewards=rewards)
    return on_bare_prompt(retry, bare_prompt_ids) if is_bare else retry


def _attempt(rollout: Rollout) -> Attempt:
    response = Response(rollout.text)
    return Attempt(reasoning_text(response), answer_text(response))
