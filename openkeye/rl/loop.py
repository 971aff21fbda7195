"""The heart of reinforcement learning: one asyncio process that says who does what, and writes down what has happened.
Open this file first.

    DataOrder ─> groups ─> Sampling ─> workers ─> Sampling ─> scorers ─> GroupBook ─┐
                                 ▲                                                  ▼
                                 └─────── publish <─ learner.step <─ consumed <─ `_batch`

Version n of the weights has learnt n times; the update that begins at version n is update n. A group is opened, its rollouts
are played, and the update that takes it is written down before the learner sees it. So after a kill at any moment the updates
behind the learner's last checkpoint are repeated from the very rollouts that they had, finished rollouts are not played again,
and nothing is learnt twice.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from openkeye.common.checks import InputError, writing_to
from openkeye.common.fields import with_options
from openkeye.common.log import JsonLines, forget_after
from openkeye.rl.context_rl import RecoverySettings
from openkeye.rl.data_order import DataOrder
from openkeye.rl.groups import Group, GroupBook
from openkeye.rl.journal import Journal
from openkeye.rl.roles import LearnedRollout, Record, RoleLost, Roles, ScoredRollout, Update
from openkeye.rl.rollout import RolloutId, TokenStreams
from openkeye.rl.rollout_figures import count_figures, evaluation_figures, rollout_figures
from openkeye.rl.run_config import JOURNAL_DIR, PostTrainingConfig, claim_run_dir
from openkeye.rl.sampling import Sampling, first_end
from openkeye.train.interrupts import Interrupts
from openkeye.train.reporter import Reporter

LOG_FILE, STAGE = "log.jsonl", "post-training"
WEIGHTS_DIR = "weights"
LEAST_COMPACTED_BYTES = 1 << 20
WATCH_SECONDS = 0.1
T = TypeVar("T")
OpenRoles = Callable[[PostTrainingConfig], AbstractAsyncContextManager[Roles]]


class Orchestrator:
    """One run, from its first step or from where it was left, to a finished model."""

    def __init__(self, config: PostTrainingConfig, open_roles: OpenRoles, reporter: Reporter) -> None:
        """
        Args:
            config: the whole run.
            open_roles: makes learner, workers and scorers, and ends them.
            reporter: told of the run's progress.
        """
        self.config = config
        self.reporter = reporter
        self.run_dir = Path(config.run_dir)
        self.is_interrupted = False
        self._open_roles = open_roles
        self._learner_version: int | None = None
        # None: it has to be opened, for the first time or after its process was lost
        self._seconds: dict[str, float] = {}
        # by phase, of the update under way
        self._published_bytes = 0
        # of the last version

    def run(self, stop_after_seconds: float = math.inf) -> bool:
        """Go on until the last step, the time limit, or Ctrl-C; then save.

        Returns:
            True where the run is finished and `out_dir` holds the model.

        Raises:
            InputError: settings, folders, weights or tasks that do not fit; a role that cannot be kept alive.
        """
        self._deadline = time.monotonic() + stop_after_seconds
        claim_run_dir(self.config)
        with Interrupts() as self._interrupts, closing(Journal(self.run_dir / JOURNAL_DIR)) as journal:
            return asyncio.run(self._run(journal))

    async def _run(self, journal: Journal) -> bool:
        config = self.config
        async with self._open_roles(config) as roles:
            self.roles = roles
            data_order = DataOrder({name: task.weight for name, task in config.tasks.items()}, roles.task_sizes, config.seed)
            recovery = with_options(RecoverySettings(), config.recovery)
            if recovery.is_on and roles.report_on is None:
                raise InputError("recovery is on, and nobody tells of mistakes; set recovery.is_on to false")
            self.book = GroupBook(journal, bool(roles.scorers), recovery)
            self.sampling = Sampling(config, self.book, data_order, roles.workers, roles.scorers, self.reporter.say)
            # Learning alone ends by itself; the others do so by an error, which is raised here.
            return await first_end(self._learn(), self.sampling.run(), self._ask_again(), self._watch())

    async def _watch(self) -> None:
        """Notice Ctrl-C and the time limit."""
        while not self.sampling.is_stopping:
            await asyncio.sleep(WATCH_SECONDS)
            if self._interrupts.is_asked or time.monotonic() > self._deadline:
                self.is_interrupted = self._interrupts.is_asked
                self.sampling.is_stopping = True
                self.sampling.changed.tell()
        await asyncio.Event().wait()

    async def _ask_again(self) -> None:
        """See to groups in which every rollout failed at its task: what reports there are opens more rollouts of them."""
        while True:
            await self.sampling.changed.until(lambda: self._recoverable() is not None)
            group = self._recoverable()
            assert group is not None and self.roles.report_on is not None, "there is one, and a reporter was asked for"
            told = await self.roles.report_on([scored.rollout for _, scored in self.book.usable(group)])
            now = self.book.groups[group.number]
            # (it may have become too old in the meantime)
            if self.book.is_recoverable(now):
                self.book.record("asked_again", {"group": group.number, "with": [asdict(one) for one in told]})
                self.sampling.changed.tell()

    def _recoverable(self) -> Group | None:
        return next((group for group in self.book.groups.values() if self.book.is_recoverable(group)), None)

    async def _learn(self) -> bool:
        """Updates until the last one; True where that was reached."""
        begins = await self._ask_learner("the start", self._learner_begins, None)
        log_path = self.run_dir / LOG_FILE
        forget_after(log_path, begins)
        self._logged = _last_step(log_path)
        with closing(JsonLines(log_path)) as self._log:
            await self._begin(begins)
            while self.book.next_update < self.config.num_steps:
                began = time.monotonic()
                batch = await self._batch()
                if batch is None:
                    await self._leave()
                    return False
                self._seconds["rollout"] = time.monotonic() - began
                await self._update(batch)
        out_dir = Path(self.config.out_dir)
        await self._ask_learner("the model", lambda: self.roles.learner.write_model(out_dir), self.config.num_steps)
        self.reporter.say(f"finished: {self.config.out_dir} holds the model")
        return True

    async def _begin(self, begins: int) -> None:
        """Bring the learner from the version of its checkpoint to where the journal is, and give its weights to the workers."""
        book, config = self.book, self.config
        if book.next_group:
            self.reporter.say(
                f"going on from step {begins} of {config.num_steps}: {book.next_update - begins} updates to repeat, "
                f"{len(book.groups)} groups open"
            )
        self.reporter.stage(STAGE, config.num_steps)
        self._began = time.monotonic()
        for version in range(begins, book.next_update):
            self._write(await self._advance(version), version + 1)
        if book.next_update < config.num_steps:
            self.sampling.discard_stale()
            await self._publish()
            if book.next_update == 0 and config.evaluate_every:
                self._write(await self._evaluate(), 0)
        if book.next_update > book.checkpoint:
            await self._save()

    async def _ask_learner(self, what: str, ask: Callable[[], Awaitable[T]], version: int | None) -> T:
        """Ask the learner something at a version: one that is lost is opened again, brought there, and asked again.

        Args:
            version: None: wherever its checkpoint is.
        """
        for number in range(1, self.config.max_losses + 1):
            try:
                if self._learner_version is None:
                    await self.roles.learner.ready()
                    self._learner_version = self._checked(await self.roles.learner.open())
                for repeated in range(self._learner_version, self._learner_version if version is None else version):
                    await self._step(repeated)
                return await ask()
            except RoleLost as lost:
                self._learner_version = None
                self.reporter.say(f"{what} begins again: {lost}")
                if number == self.config.max_losses:
                    raise InputError(
                        f"{what} was given up after {number} losses ({lost}); look at the learner's output"
                    ) from lost
        raise AssertionError("max_losses is at least 1")

    def _checked(self, version: int) -> int:
        """The version of the learner's checkpoint, which has to be one that the journal can go on from."""
        book = self.book
        if not book.checkpoint <= version <= book.next_update:
            raise InputError(
                f"{self.run_dir}: the learner stands at step {version}, and the journal goes on from steps {book.checkpoint} "
                f"to {book.next_update}; checkpoints and journal are of different runs: restore both, or give another run_dir"
            )
        return version

    async def _learner_begins(self) -> int:
        assert self._learner_version is not None
        return self._learner_version

    async def _batch(self) -> list[int] | None:
        """Numbers of the groups of the next update; None where the run is to stop."""
        batch: list[int] = []
        num_dropped = 0
        while len(batch) < self.config.groups_per_step:
            group = await self._next_complete(batch)
            if group is None:
                return None
            reason = "failed"
            if self.book.is_comparable(group):
                reason = "zero_variance"
                if self._streams(self.book.usable(group)) is not None:
                    batch.append(group.number)
                    num_dropped = 0
                    continue
            num_dropped += 1
            if num_dropped > self.config.max_dropped:
                raise InputError(
                    f"{num_dropped} groups in a row taught nothing (the last one: {reason}, {group.id(0)}); look at the tasks' "
                    "rewards, or raise max_dropped"
                )
            self.book.record("dropped", {"group": group.number, "reason": reason})
            self.sampling.changed.tell()
        return batch

    async def _next_complete(self, taken: Sequence[int]) -> Group | None:
        """The complete group that is taken next; None where the run is to stop."""
        found: list[Group] = []

        def is_over() -> bool:
            others = [group for group in self.book.groups.values() if group.number not in taken]
            if self.config.takes == "opened":
                others = others[:1]
            complete = [group for group in others if group.completed_at and not self.book.is_recoverable(group)]
            found[:] = sorted(complete, key=lambda group: group.completed_at)[:1]
            return bool(found) or self.sampling.is_stopping

        await self.sampling.changed.until(is_over)
        return None if self.sampling.is_stopping else found[0]

    def _streams(self, usable: Sequence[tuple[int, ScoredRollout]]) -> list[TokenStreams] | None:
        return self.roles.streams_of([scored for _, scored in usable])

    async def _update(self, batch: Sequence[int]) -> None:
        """Learn from these groups, and sample with the result."""
        book, config = self.book, self.config
        version = book.next_update
        counts = count_figures(book.counts, len(book.groups), self.sampling.num_lost)
        counts["groups/recovered"] = sum(bool(book.usable_again(book.groups[number])) for number in batch)
        self._seconds["score"], self.sampling.score_seconds = self.sampling.score_seconds, 0.0
        book.record("consumed", {"update": version, "groups": list(batch), "counts": counts})
        self.sampling.discard_stale()
        record = await self._advance(version)
        if book.next_update < config.num_steps:
            await self._publish()
        if config.evaluate_every and (book.next_update % config.evaluate_every == 0 or book.next_update == config.num_steps):
            record |= await self._evaluate()
        self._write(record, version + 1)
        if book.next_update % config.save_every_steps == 0 or book.next_update == config.num_steps:
            await self._save()

    async def _advance(self, version: int) -> Record:
        """Update `version`."""
        began = time.monotonic()
        record = await self._ask_learner(f"update {version}", lambda: self._step(version), version)
        self._seconds["update"] = time.monotonic() - began
        return record

    async def _step(self, version: int) -> Record:
        consumed = self.book.updates[version]
        samples: list[LearnedRollout] = []
        for group in consumed.groups:
            usable = self.book.usable(group)
            streams = self._streams(usable)
            assert streams is not None, f"{group.id(0)} was taken, so it teaches something"
            samples += [
                LearnedRollout(scored.rollout, stream, attempt, self.book.in_prompt(group, scored.rollout.id.member))
                for (attempt, scored), stream in zip(usable, streams, strict=True)
            ]
        assert all(sample.rollout.age(version) <= self.config.max_age for sample in samples), f"update {version}: too old"
        record = await self.roles.learner.step(Update(version, tuple(samples)))
        self._learner_version = version + 1
        figures = rollout_figures([sample.rollout for sample in samples], version)
        return {**record, **figures, **consumed.event.facts["counts"]}

    async def _publish(self) -> None:
        """Hand the learner's weights to the workers."""
        began, version = time.monotonic(), self.book.next_update
        folder = self.run_dir / WEIGHTS_DIR
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
        path = folder / f"version-{version:06}.safetensors"
        weights = await self._ask_learner(f"publication {version}", lambda: self.roles.learner.publish(path), version)
        assert weights.version == version, f"the learner published version {weights.version}, not {version}"
        await self.sampling.publish(weights)
        self.book.record("published", {"version": version})
        for old in folder.glob("version-*"):
            # Those that workers read have to stay; a lost one reads the newest again.
            if str(old) not in (weights.path, *weights.rests_on):
                old.unlink()
        self._published_bytes = weights.num_bytes
        self._seconds["publish"] = time.monotonic() - began

    async def _evaluate(self) -> Record:
        """Scores of the version that workers have; kept, so that no version is asked twice."""
        version, config = self.book.next_update, self.config
        if version not in self.book.evaluated and not self.sampling.is_stopping:
            began = time.monotonic()
            if self.sampling.version != version:
                await self._publish()
            ids = [
                RolloutId(task, number, -1 - version, place * config.num_evaluation_examples + number)
                for place, task in enumerate(config.evaluation_tasks)
                for number in range(_least(config.num_evaluation_examples, self.roles.task_sizes[task]))
            ]
            scores = evaluation_figures(await self.sampling.evaluate(ids))
            if self.sampling.is_stopping:
                return {}
            self.book.record("evaluated", {"version": version, "scores": scores})
            self._seconds["evaluation"] = time.monotonic() - began
        return dict(self.book.evaluated.get(version, {}))

    async def _save(self) -> None:
        """A checkpoint, after which what was learnt before is no longer needed."""
        version = self.book.next_update
        await self._ask_learner(f"checkpoint {version}", self.roles.learner.save, version)
        self.book.record("checkpoint", {"version": version})
        self.book.compact_if_worth(LEAST_COMPACTED_BYTES)

    async def _leave(self) -> None:
        """Stop with everything on the disk."""
        await self.sampling.interrupt()
        if self.book.next_update > self.book.checkpoint:
            await self._save()
        why = "interrupted" if self.is_interrupted else "out of time"
        self.reporter.say(
            f"{why}: step {self.book.next_update} is saved in {self.run_dir}; start the same run again to go on from it"
        )

    def _write(self, record: Record, step: int) -> None:
        """One line of the log, unless the step is told of already: a learner that was lost repeats its steps."""
        now = time.monotonic()
        seconds_per_step, seconds = now - self._began, self._seconds
        self._began, self._seconds = now, {}
        if step <= self._logged:
            return
        self._logged = step
        if "publish" in seconds:
            record = record | {"publish/bytes": self._published_bytes}
        timing: Record = {f"seconds/{phase}": value for phase, value in seconds.items()}
        timing |= {"seconds_per_step": seconds_per_step, "seconds_left": seconds_per_step * (self.config.num_steps - step)}
        if "sampled_tokens" in record:
            timing["tokens_per_second"] = float(record["sampled_tokens"]) / seconds_per_step
        # (a learner may count optimizer steps of its own, under the same name)
        line: Record = record | timing | {"step": step, "stage": STAGE}
        self._log.write(**line)
        self.reporter.step(line)


def _last_step(path: Path) -> int:
    """Of a log whose lines are whole; -1 where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else -1


def _least(count: int, size: int | None) -> int:
    return count if size is None else min(count, size)
