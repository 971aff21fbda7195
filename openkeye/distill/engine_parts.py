"""The parts of a distillation over engines and the learner of `openkeye.rl`: what a recipe's `opens` builds on."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from openkeye.common.fields import unknown
from openkeye.distill.alignment import ProcessorReader
from openkeye.distill.config import DistillRun, Option
from openkeye.distill.loop import DistillParts
from openkeye.distill.scored import Scored
from openkeye.distill.streams import SupportDivergence
from openkeye.distill.teacher_weights import ResidentWeights, WeightFigures
from openkeye.distill.teachers import TeacherPool
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.engine.scorer import Scorer
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.episode import EpisodeLimits, run_episode
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine
from openkeye.rl.policy_loss import PolicyTokens, Support, SupportLosses
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.rollout_document import rollout_document
from openkeye.tasks.task import Example, Task
from openkeye.train.step_log import Record

NUM_SLOTS = 16
# responses that an engine scores at once


class EngineScorer:
    """`loop.StudentScorer` of an engine."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    async def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `scored.ResponseScorer.score`."""
        found = await self.scorer.score(prompt, output_ids, chosen_ids, top_k)
        if chosen_ids is None or found.chosen is None:
            chosen = np.zeros((len(output_ids), 0), np.float32)
        else:
            # Where nothing was asked the engine says that it is impossible.
            chosen = np.where(np.asarray(chosen_ids) < 0, np.float32(0), found.chosen)
        return Scored(found.logprobs, chosen, found.top_ids, found.top_logprobs)


class EngineSeat(EngineScorer):
    """`teachers.Seat` of an engine: tensors that differ between two teachers go to it, and no others."""

    num_slots = NUM_SLOTS

    def __init__(self, scorer: Scorer, base_dir: str | None) -> None:
        """base_dir: of which deltas are; it stays in the host's memory."""
        super().__init__(scorer)
        self._weights = ResidentWeights(base_dir)

    @property
    def figures(self) -> WeightFigures:
        """See `teachers.Seat.figures`."""
        return self._weights.figures

    async def use(self, folder: str) -> None:
        """See `teachers.Seat.use`."""
        model = await asyncio.to_thread(self._weights.use, folder)
        own = model.state_dict()
        await self.scorer.load(folder, {name: own[name] for name in self._weights.changed_names})


class EnginePolicy:
    """`loop.Policy`: episodes over an engine; the engine that reads for the student is given the same weights."""

    def __init__(self, policy: PolicyEngine, reader: Scorer, tasks: Mapping[str, Task], limits: EpisodeLimits) -> None:
        self.policy, self._reader, self._tasks, self._limits = policy, reader, tasks, limits

    async def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `loop.Policy.publish`."""
        if version == self.policy.version:
            return
        changes = dict(weights)
        await self.policy.publish(version, changes)
        await self._reader.load(f"student {version}", changes)

    async def roll(self, example: Example, id: RolloutId) -> Rollout:
        """See `loop.Policy.roll`."""
        return await run_episode(self.policy, self._tasks[example.task], example, id, limits=self._limits)


class RankLearner:
    """`loop.Learner` of this process."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    @property
    def version(self) -> int:
        return self._learner.version

    def step(self, samples: Sequence[LearnerSample]) -> Record:
        """See `loop.Learner.step`."""
        return self._learner.step(samples)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """See `loop.Learner.weights`."""
        return self._learner.weights()

    def save(self) -> None:
        """See `loop.Learner.save`."""
        self._learner.save()

    def write_model(self, out_dir: Path) -> None:
        """See `loop.Learner.write_model`."""
        self._learner.write_model(out_dir)


def open_engine_parts(run: DistillRun, tasks: Mapping[str, Task], engine: EngineConfig | None = None) -> DistillParts:
    """Engines for the student's answers, the student's reading and the teachers, and a learner, all on this process's device.

    Args:
        run: `learner` holds fields of `LearnerConfig`.
        tasks: by name.
        engine: settings of all three engines.

    Raises:
        InputError: folders or settings that do not fit.
    """
    config = run.distill
    base = config.base_dir or None
    stack = ExitStack()
    learner = stack.enter_context(
        opened_learner(
            learner_config(run),
            AlgorithmConfig(objective="dapo"),
            support_divergence=partial(_compare, SupportDivergence(config.estimator)),
        )
    )
    policy = PolicyEngine(Engine(run.model_dir, config=engine), PolicyConfig(seed=run.seed))
    reader = Scorer(Engine(run.model_dir, config=engine), "student 0")
    seat = Scorer(Engine(base or next(iter(config.teachers.values())), config=engine), "nobody")
    for one in (policy, reader, seat):
        stack.callback(one.close)
    limits = EpisodeLimits(max_turn_tokens=run.max_tokens, max_tokens=run.max_tokens)
    return DistillParts(
        policy=EnginePolicy(policy, reader, tasks, limits),
        student=EngineScorer(reader),
        learner=RankLearner(learner),
        pool=TeacherPool(config.teachers, EngineSeat(seat, base), config.cache_bytes),
        student_reader=ProcessorReader(policy.processor),
        teacher_readers={name: ProcessorReader(Processor.load(folder)) for name, folder in config.teachers.items()},
        tasks=tasks,
        tokenizer=policy.processor.tokenizer,
        vocab_size=learner.model_config.vocab_size,
        make_sample=LearnerSample,
        make_document=rollout_document,
        close=stack.close,
    )


def _compare(estimator: SupportDivergence, tokens: PolicyTokens, support: Support) -> SupportLosses:
    return SupportLosses(*estimator(tokens, support))


def learner_config(run: DistillRun) -> LearnerConfig:
    """What `DistillRun.learner` says of the learner.

    Raises:
        InputError: a field that it has not.
    """
    given: dict[str, Option | tuple[str, ...]] = dict(run.learner)
    known = [field.name for field in fields(LearnerConfig)]
    for name in given:
        if name not in known:
            raise unknown("learner setting", name, known)
    if isinstance(trains := given.get("trains"), str):
        given["trains"] = tuple(trains.split(","))
    folder = str(Path(run.run_dir) / "learner")
    return LearnerConfig(**{"model_dir": run.model_dir, "run_dir": folder, **given})  # type: ignore[arg-type]
