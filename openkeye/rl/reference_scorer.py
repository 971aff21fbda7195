"""A `ScorerRole` with the reference policy: how likely its weights, which never change, find what was sampled."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from openkeye.common.fields import with_options
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.engine.scorer import Scorer
from openkeye.inputs.prompt import Prompt
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.prompts import open_tasks, prompt_of
from openkeye.rl.roles import ScoredRollout
from openkeye.rl.rollout import Rollout, TokenStreams
from openkeye.rl.run_config import PostTrainingConfig

REF_LOGPROBS = "ref_logprobs"
# [T] float32 of `ScoredRollout.arrays`
NUM_PROMPTS = 16
# the last ones, kept laid out: members of a group are asked the same


class ReferenceScorer:
    """See the top of this file; it lives in the process of its engine."""

    def __init__(self, config: PostTrainingConfig) -> None:
        """With the weights of `config.reference_dir`, or of `model_dir` where there is none."""
        model_dir = config.reference_dir or config.model_dir
        engine_config = with_options(EngineConfig(max_batch_requests=config.num_slots), config.engine)
        self._scorer = Scorer(Engine(model_dir, config=engine_config), model_dir)
        self._tasks = open_tasks(config)
        self._asked: OrderedDict[tuple[str, int], asyncio.Task[Prompt]] = OrderedDict()

    async def ready(self) -> None:
        """Always."""

    async def score(self, rollout: Rollout) -> ScoredRollout:
        """See `ScorerRole.score`."""
        if not len(rollout.output_ids):
            return ScoredRollout(rollout, {REF_LOGPROBS: np.zeros(0, dtype=np.float32)})
        prompt = await self._prompt(rollout)
        scored = await self._scorer.score(prompt, rollout.output_ids)
        return ScoredRollout(rollout, {REF_LOGPROBS: scored.logprobs})

    async def close(self) -> None:
        """End the engine's thread."""
        await asyncio.to_thread(self._scorer.close)

    async def _prompt(self, rollout: Rollout) -> Prompt:
        key = rollout.id.task, rollout.id.number
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(asyncio.to_thread(self._read, *key))
            if len(self._asked) > NUM_PROMPTS:
                self._asked.popitem(last=False)
        prompt = await asyncio.shield(self._asked[key])
        assert np.array_equal(prompt.model_input.input_ids.numpy(), rollout.prompt_ids), f"{rollout.id}: another prompt"
        return prompt

    def _read(self, task: str, number: int) -> Prompt:
        return prompt_of(self._tasks[task].read(number), self._scorer.engine.processor)


async def open_reference_scorer(config: PostTrainingConfig) -> ReferenceScorer:
    """In the scorer's process."""
    return await asyncio.to_thread(ReferenceScorer, config)


def streams_by(algorithm: AlgorithmConfig, group: Sequence[ScoredRollout]) -> list[TokenStreams] | None:
    """See `roles.StreamsOf`; with a reference, its log-probabilities come beside each rollout."""
    references = [scored.arrays[REF_LOGPROBS] for scored in group] if algorithm.ref_kl_weight else None
    return streams_of([scored.rollout for scored in group], algorithm, references)
