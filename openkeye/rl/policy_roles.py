"""The roles of a real run: a worker with an engine, and a learner; each in this process or in one of its own.

`open_roles` is what `PostTrainingConfig.opens` names. Examples are read again from their numbers wherever they are needed, so
that pictures and videos never travel.
"""

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from openkeye.agents.environment import Environment, Opening
from openkeye.common.fields import with_options
from openkeye.common.launch import num_ranks, rank
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.update_file import write_update
from openkeye.engine.weight_update import WeightUpdate
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.context_rl import RecoverySettings, reports_on, with_report
from openkeye.rl.environment_pool import EnvironmentPool, HostedEnvironment, environment_pool
from openkeye.rl.episode import EpisodeInterrupted, EpisodeLimits, EpisodeState, run_episode
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample, share_out
from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine, lay_out_prompt
from openkeye.rl.processes import ProcessLearner, ProcessWorker, RoleProcess, role_folder
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
    ScoredRollout,
    Update,
)
from openkeye.rl.rollout import Rollout, RolloutId, TokenStreams
from openkeye.rl.rollout_document import rollout_document
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.tasks.registry import open_reporter, open_task
from openkeye.tasks.task import Example, Task

LEARNER_DIR = "learner"
Result = TypeVar("Result")


def open_tasks(config: PostTrainingConfig) -> dict[str, Task]:
    """The tasks of a run, those of its evaluation among them, by their names in the run.

    Raises:
        InputError: no such task or option.
    """
    named = {**config.evaluation_tasks, **config.tasks}
    return {name: open_task(task.reader, task.options) for name, task in named.items()}


class EngineWorker:
    """A `RolloutWorker` in the process of its engine."""

    def __init__(self, config: PostTrainingConfig) -> None:
        engine_config = with_options(EngineConfig(records_routes=True, max_batch_requests=config.num_slots), config.engine)
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
            await self._policy.publish_file(weights.path)

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
            return Publication(0, self._config.model_dir)
        # All ranks go through the weights, and one writes them.
        tensors = dict(self._own.weights())
        if rank():
            return Publication(version, str(path))
        return Publication(version, str(write_update(path.parent, WeightUpdate(version, tensors))))

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
        if example.environment is None:
            return lay_out_prompt(example.messages, self._processor, example.tools)
        opening = asyncio.run(_opening(example.environment))
        return lay_out_prompt(opening.messages, self._processor, opening.tools)


async def _opening(environment: Environment) -> Opening:
    try:
        return await environment.reset()
    finally:
        await environment.close()


async def open_worker(config: PostTrainingConfig, folder: Path) -> RolloutWorker:
    """In the worker's process. folder: of whoever started it."""
    worker = await asyncio.to_thread(EngineWorker, config)
    await worker.open_environments(folder)
    return worker


async def open_learner(config: PostTrainingConfig) -> LearnerRole:
    """In the process of every rank."""
    return await asyncio.to_thread(PolicyLearner, config)


def streams_by(algorithm: AlgorithmConfig, group: Sequence[ScoredRollout]) -> list[TokenStreams] | None:
    """See `roles.StreamsOf`."""
    return streams_of([scored.rollout for scored in group], algorithm)


@asynccontextmanager
async def open_roles(config: PostTrainingConfig) -> AsyncIterator[Roles]:
    """An engine a worker, and the learner; with `num_workers=0` all in this process.

    Raises:
        InputError: tasks or settings that are not known; a role that cannot be opened.
    """
    tasks = open_tasks(config)
    sizes = {name: task.num_examples for name, task in tasks.items()}
    report_on = reports_of(config, tasks)
    streams = partial(streams_by, with_options(AlgorithmConfig(), config.algorithm))
    if not config.num_workers:
        worker, learner = await asyncio.to_thread(EngineWorker, config), await asyncio.to_thread(PolicyLearner, config)
        try:
            await worker.open_environments()
            yield Roles(learner, [worker], (), streams, sizes, report_on)
        finally:
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
        try:
            workers = [ProcessWorker(process, config.num_slots) for process in processes[1:]]
            yield Roles(ProcessLearner(processes[0]), workers, (), streams, sizes, report_on)
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
