"""Turns of a policy as a learner's samples, with rewards that are drawn: a step costs the same whoever earns."""

from collections.abc import Sequence

import numpy as np

from openkeye.inputs.prompt import Prompt
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.policy_engine import SampledTurn
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.rollout_document import rollout_document

ALGORITHM = AlgorithmConfig("gspo", correction="none")


def samples_of(prompt: Prompt, turns: Sequence[SampledTurn], id: RolloutId, patch_size: int = 14) -> list[LearnerSample]:
    """One group's answers, half of them rewarded. id: of its first member."""
    rewards = np.random.default_rng([id.number, id.group]).permutation(np.arange(len(turns)) % 2).tolist()
    rollouts = [
        Rollout(
            RolloutId(id.task, id.number, id.group, member),
            prompt.model_input.input_ids.numpy().astype(np.int32),
            turn.ids,
            np.ones(len(turn.ids), dtype=bool),
            turn.logprobs,
            turn.versions,
            turn.routes,
            turn.finish_reason,
            {"outcome": float(reward)},
        )
        for member, (turn, reward) in enumerate(zip(turns, rewards, strict=True))
    ]
    streams = streams_of(rollouts, ALGORITHM)
    assert streams is not None, "a group of two at least, half of which is rewarded"
    return [
        LearnerSample(rollout_document(prompt, rollout, patch_size), rollout, own)
        for rollout, own in zip(rollouts, streams, strict=True)
    ]
