"""The roles of a real run: a worker with an engine, and a learner; each in this process or in one of its own.

`open_roles` is what `PostTrainingConfig.opens` names. Examples are read again from their numbers wherever they are needed, so
that pictures and videos never travel.
"""

import asyncio
import pickle
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from openkeye.common.checks import InputError
from openkeye.common.fields import with_options
from openkeye.common.launch import num_ranks, rank
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.update_file import updates_among
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.context_rl import RecoverySettings, reports_on, with_report
from openkeye.rl.environment_pool import EnvironmentPool, HostedEnvironment, environment_pool
from openkeye.rl.episode import EpisodeInterrupted, EpisodeLimits, EpisodeState, run_episode
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample, share_out
from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine
from openkeye.rl.processes import ProcessLearner, ProcessScorer, ProcessWorker, RoleProcess, role_folder
from openkeye.rl.prompts import open_tasks, prompt_of
from openkeye.rl.publisher import Publisher
from openkeye.rl.reference_scorer import open_reference_scorer, streams_by
from openkeye.rl.roles import (
    AskedAgain,
    LearnedRollout,
    LearnerRole,
    OnPartial,
    PartialRollout,
    Publication,
    Record,
    ReportOn,
    Roles,
    RolloutOrder,
    RolloutWorker,
    Update,
)
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.rollout_document import rollout_document
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.tasks.registry import open_reporter
from openkeye.tasks.task import Example, Task

LEARNER_DIR = "learner"
RECORDED_STEPS = 512
# of the engine, of which one keeps the keys that its tokens select
Result = TypeVar("Result")


class EngineWorker:
    """A `RolloutWorker` in the process of its engine."""

    def __init__(self, config: PostTrainingConfig) -> None:
        defaults = EngineConfig(records_routes=True, records_picks_every=RECORDED_STEPS, max_batch_requests=config.num_slots)
        engine_config = with_options(defaults, config.engine)
        self._policy = PolicyEngine(Engine(config.model_dir, config=engine_config), PolicyConfig(config.seed))
        self._tasks = open_tasks(config)
        self._recovery = with_options(RecoverySettings(), config.recovery)
        self._opened = AsyncExitStack()
        self._config = config
        self._asked: dict[tuple[str, int], asyncio.Task[tuple[Example, Prompt | None]]] = {}
        # the last examples
        self._limits = with_options(
            EpisodeLimits(max_turn_tokens=config.max_tokens, step_seconds=config.rollout_seconds), config.episode
        )

    @property
    def num_slots(self) -> int:
        """See `RolloutWorker.num_slots`."""
        return self._config.num_slots

    async def open_environments(self, folder: Path | None = None) -> None:
        """Start the processes that environments act in, where the run has some."""
        if self._config.num_environments:
            pool = environment_pool(self._config.num_environments, self._config.blocked_seconds, folder)
            await self._opened.enter_async_context(pool)

    async def ready(self) -> None:
        """Always."""

    async def publish(self, weights: Publication) -> None:
        """See `RolloutWorker.publish`."""
        if weights.version > self._policy.version:
            # One that is behind begins with the newest whole weights; the others read what has changed.
            for path in await asyncio.to_thread(updates_among, (*weights.rests_on, weights.path), self._policy.version):
                await self._policy.publish_file(path)

    async def roll(self, order: RolloutOrder, on_partial: OnPartial) -> Rollout | PartialRollout:
        """See `RolloutWorker.roll`."""
        id, config = order.id, self._config
        task = self._tasks[id.task]
        example, prompt = await self._asked_of(id)
        if example.environment is not None and EnvironmentPool.current is not None:
            example = replace(example, environment=HostedEnvironment(example.environment, order.label))
        if order.again is not None:
            example, prompt = with_report(example, order.again, self._recovery.shows_attempt), None
        sampling = SamplingParameters(temperature=config.temperature, top_p=config.top_p)
        if order.is_evaluation:
            sampling = SamplingParameters(temperature=0.0)
        state: EpisodeState | None = None if order.partial is None else pickle.loads(order.partial.state)
        try:
            return await run_episode(
                self._policy,
                task,
                example,
                id,
                lambda state: on_partial(self._partial(state)),
                sampling=sampling,
                limits=self._limits,
                state=state,
                prompt=prompt,
            )
        except EpisodeInterrupted as interrupted:
            return self._partial(interrupted.state)

    async def interrupt(self) -> None:
        """See `RolloutWorker.interrupt`."""
        await self._policy.interrupt()

    async def _asked_of(self, id: RolloutId) -> tuple[Example, Prompt | None]:
        """The example, read and laid out once for a group; environments have a prompt of their own."""
        key = id.task, id.number
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._read(*key))
            if len(self._asked) > self._config.num_slots:
                del self._asked[next(iter(self._asked))]
        # One member may be cancelled, and the others still want it.
        return await asyncio.shield(self._asked[key])

    async def _read(self, name: str, number: int) -> tuple[Example, Prompt | None]:
        example = await asyncio.to_thread(self._tasks[name].read, number)
        if example.environment is not None:
            return example, None
        return example, await self._policy.lay_out(example.messages, example.tools)

    async def close(self) -> None:
        """End the engine's thread, and what environments act in."""
        self._policy.close()
        await self._opened.aclose()

    def _partial(self, state: EpisodeState) -> PartialRollout:
        turns = [state.versions[state.is_policy]] + ([] if state.partial is None else [state.partial.versions])
        versions = np.concatenate(turns)
        oldest = int(versions.min()) if len(versions) else self._policy.version
        return PartialRollout(state.id, oldest, len(versions), pickle.dumps(state))


class PolicyLearner:
    """A `LearnerRole` in the process of its learner; under torchrun in every rank. It computes on a thread of its own."""

    def __init__(self, config: PostTrainingConfig) -> None:
        self._config = config
        self._algorithm = with_options(AlgorithmConfig(), config.algorithm)
        learner = LearnerConfig(model_dir=config.model_dir, run_dir=str(Path(config.run_dir) / LEARNER_DIR))
        self._learner_config = with_options(learner, config.learner)
        self._tasks = open_tasks(config)
        self._processor = Processor.load(config.model_dir)
        self._opened = ExitStack()
        self._learner: Learner | None = None
        self._publisher = Publisher()
        self._recovery = with_options(RecoverySettings(), config.recovery)
        self._prompts: dict[tuple[str, int, AskedAgain | None], Prompt] = {}
        # the last one
        self._thread = ThreadPoolExecutor(1, "openkeye-learner")

    async def ready(self) -> None:
        """Always."""

    async def open(self) -> int:
        """See `LearnerRole.open`."""
        return await self._run(self._open)

    async def step(self, update: Update) -> Record:
        """See `LearnerRole.step`."""
        return await self._run(lambda: self._step(update))

    async def save(self) -> None:
        """See `LearnerRole.save`."""
        await self._run(self._own.save)

    async def publish(self, path: Path) -> Publication:
        """See `LearnerRole.publish`."""
        return await self._run(lambda: self._publish(path))

    async def write_model(self, out_dir: Path) -> None:
        """See `LearnerRole.write_model`."""
        await self._run(lambda: self._own.write_model(out_dir))

    def close(self) -> None:
        """Leave the other ranks, and end the thread."""
        self._thread.submit(self._opened.close).result()
        self._thread.shutdown()

    @property
    def _own(self) -> Learner:
        assert self._learner is not None, "it is opened first"
        return self._learner

    async def _run(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _open(self) -> int:
        self._opened.close()
        # Steps that are repeated need not make the same bits: what was published before is nothing to tell changes against.
        self._publisher = Publisher()
        self._learner = self._opened.enter_context(opened_learner(self._learner_config, self._algorithm))
        return self._learner.version

    def _step(self, update: Update) -> Record:
        mine = share_out([sample.rollout for sample in update.samples], num_ranks())[rank()]
        samples = [self._sample(update.samples[number]) for number in mine]
        records = self._own.update(samples)
        return {name: _mean([record[name] for record in records if name in record]) for name in records[-1]}

    def _sample(self, learned: LearnedRollout) -> LearnerSample:
        document = rollout_document(self._prompt(learned), learned.rollout)
        return LearnerSample(document, learned.rollout, learned.streams)

    def _publish(self, path: Path) -> Publication:
        version = self._own.version
        if not version:
            # Workers begin with these weights.
            if not rank():
                self._publisher.begin(self._own.weights())
            else:
                deque(self._own.weights(), maxlen=0)
            return Publication(0, self._config.model_dir)
        # All ranks go through the weights, and one writes them.
        if rank():
            deque(self._own.weights(), maxlen=0)
            return Publication(version, str(path))
        return self._publisher.publish(version, self._own.weights(), path.parent)

    def _prompt(self, learned: LearnedRollout) -> Prompt:
        """As the engine laid it out. Members of a group follow one another, and most are asked the same."""
        key = learned.rollout.id.task, learned.rollout.id.number, learned.again
        if key not in self._prompts:
            self._prompts = {key: self._laid_out(*key)}
        return self._prompts[key]

    def _laid_out(self, name: str, number: int, again: AskedAgain | None) -> Prompt:
        example = self._tasks[name].read(number)
        if again is not None:
            example = with_report(example, again, self._recovery.shows_attempt)
        return prompt_of(example, self._processor)


async def open_worker(config: PostTrainingConfig, folder: Path) -> RolloutWorker:
    """In the worker's process. folder: of whoever started it."""
    worker = await asyncio.to_thread(EngineWorker, config)
    await worker.open_environments(folder)
    return worker


async def open_learner(config: PostTrainingConfig) -> LearnerRole:
    """In the process of every rank."""
    return await asyncio.to_thread(PolicyLearner, config)


@asynccontextmanager
async def open_roles(config: PostTrainingConfig) -> AsyncIterator[Roles]:
    """An engine a worker, and the learner; with `num_workers=0` all in this process.

    Raises:
        InputError: tasks or settings that are not known; a role that cannot be opened.
    """
    tasks = open_tasks(config)
    sizes = {name: task.num_examples for name, task in tasks.items()}
    report_on = reports_of(config, tasks)
    algorithm = with_options(AlgorithmConfig(), config.algorithm)
    streams, has_reference = partial(streams_by, algorithm), algorithm.ref_kl_weight > 0
    if has_reference and report_on is not None:
        raise InputError(
            "algorithm.ref_kl_weight and recovery.is_on: the reference does not know the reports that retries are asked with; "
            "set one of them to 0 or false"
        )
    if not config.num_workers:
        worker, learner = await asyncio.to_thread(EngineWorker, config), await asyncio.to_thread(PolicyLearner, config)
        scorers = [await open_reference_scorer(config)] if has_reference else []
        try:
            await worker.open_environments()
            yield Roles(learner, [worker], scorers, streams, sizes, report_on)
        finally:
            for scorer in scorers:
                await scorer.close()
            await worker.close()
            learner.close()
        return
    async with role_folder() as folder:
        ranks = config.num_ranks if config.num_ranks > 1 else 0
        processes = [
            RoleProcess(folder, "learner", partial(open_learner, config), ranks, environment=gpus(0, config.num_ranks))
        ]
        for number in range(config.num_workers):
            processes.append(
                RoleProcess(
                    folder,
                    f"worker{number}",
                    partial(open_worker, config, folder),
                    blocked_seconds=config.blocked_seconds,
                    environment=gpus(config.num_ranks + number, 1),
                )
            )
        for number in range(max(1, config.num_scorers) if has_reference else 0):
            place = gpus(config.num_ranks + config.num_workers + number, 1)
            opens = partial(open_reference_scorer, config)
            processes.append(RoleProcess(folder, f"scorer{number}", opens, environment=place))
        try:
            first_scorer = 1 + config.num_workers
            workers = [ProcessWorker(process, config.num_slots) for process in processes[1:first_scorer]]
            scoring = [ProcessScorer(process) for process in processes[first_scorer:]]
            yield Roles(ProcessLearner(processes[0]), workers, scoring, streams, sizes, report_on)
        finally:
            await asyncio.gather(*(process.stop() for process in processes))


def reports_of(config: PostTrainingConfig, tasks: Mapping[str, Task]) -> ReportOn | None:
    """Reports on failed groups, where the run asks them again.

    Raises:
        InputError: a task whose mistakes nobody tells of.
    """
    settings = with_options(RecoverySettings(), config.recovery)
    if not settings.is_on:
        return None
    reporters = {name: open_reporter(task.reader) for name, task in config.tasks.items()}

    async def report_on(group: Sequence[Rollout]) -> list[AskedAgain]:
        id = group[0].id
        example = await asyncio.to_thread(tasks[id.task].read, id.number)
        return (await reports_on(group, example, reporters[id.task], settings))[0]

    return report_on


def gpus(first: int, number: int) -> dict[str, str]:
    """The variable that shows a process so many of this machine's GPUs, counted round and round; none where there are none."""
    count = torch.cuda.device_count()
    shown = ",".join(str((first + place) % count) for place in range(number)) if count else ""
    return {"CUDA_VISIBLE_DEVICES": shown} if count else {}


def _mean(values: Sequence[float | int | str]) -> float | int | str:
    return values[-1] if any(isinstance(value, str) for value in values) else float(np.mean([float(value) for value in values]))
