"""Small roles for tests of the control plane: all that they do follows from ids and weights, so that runs can be compared.

The learner's weights are a digest of all that it has learnt in order, and what workers sample depends on that digest: two runs
that end with the same weights have learnt the same rollouts, sampled by the same weights, in the same order.

As a process that may be killed: python -m tests.rl.stand_ins RUN_DIR JSON_OF_CHANGES (`start_run`).
"""

import asyncio
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from openkeye.rl.journal import Journal
from openkeye.rl.loop import Orchestrator
from openkeye.rl.roles import (
    AskedAgain,
    OnPartial,
    PartialRollout,
    Publication,
    Record,
    Roles,
    RolloutOrder,
    ScoredRollout,
    Update,
)
from openkeye.rl.rollout import Rollout, RolloutId, TokenStreams
from openkeye.rl.run_config import PostTrainingConfig, TaskConfig
from openkeye.train.reporter import SilentReporter

SIZES = {"sums": 7, "words": None, "probe": 3}
GROUP_SIZE = 3
LENGTH = 12
# tokens of a rollout
ZERO_VARIANCE_EVERY = 5
# groups


def config_of(folder: Path, **changes: Any) -> PostTrainingConfig:
    """A run of six updates of two groups of three."""
    config = PostTrainingConfig(
        model_dir="none",
        run_dir=str(folder / "run"),
        out_dir=str(folder / "out"),
        tasks={"sums": TaskConfig("sums", 2.0), "words": TaskConfig("words", 1.0)},
        num_steps=6,
        opens="tests.rl.stand_ins:open_roles",
        group_size=GROUP_SIZE,
        groups_per_step=2,
        oversampling=1.5,
        max_age=0,
        takes="opened",
        num_slots=4,
        save_every_steps=2,
        seed=3,
        rollout_seconds=5.0,
    )
    return replace(config, **changes)


def digest(*parts: Any) -> int:
    """63 bits that follow from the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class DigestLearner:
    """A learner whose weights are a digest of what it has learnt."""

    run_dir: Path
    version: int = 0
    weights: int = 0
    learnt: list[str] = field(default_factory=list)
    # ids in order, with a digest of their arrays
    seconds: float = 0.0
    on_step: Callable[[Update], None] = lambda update: None

    @property
    def path(self) -> Path:
        return self.run_dir / "learner.json"

    async def ready(self) -> None:
        """Always."""

    async def open(self) -> int:
        """See `LearnerRole.open`."""
        state = json.loads(self.path.read_text()) if self.path.is_file() else {"version": 0, "weights": 0, "learnt": []}
        self.version, self.weights, self.learnt = state["version"], state["weights"], state["learnt"]
        return self.version

    async def step(self, update: Update) -> Record:
        """See `LearnerRole.step`."""
        assert update.version == self.version, f"update {update.version} at version {self.version}"
        self.on_step(update)
        for sample in update.samples:
            rollout = sample.rollout
            content = [rollout.output_ids.tolist(), rollout.versions.tolist(), sample.streams.advantages.tolist()]
            self.learnt.append(f"{update.version} {rollout.id} {digest(content)}")
        await asyncio.sleep(self.seconds)
        self.weights, self.version = digest(self.weights, self.learnt), self.version + 1
        return {"loss": 0.5, "entropy": 1.0}

    async def save(self) -> None:
        """See `LearnerRole.save`."""
        write_whole(self.path, json.dumps({"version": self.version, "weights": self.weights, "learnt": self.learnt}))

    async def publish(self, path: Path) -> Publication:
        """See `LearnerRole.publish`."""
        write_whole(path, json.dumps([self.version, self.weights]))
        return Publication(self.version, str(path))

    async def write_model(self, out_dir: Path) -> None:
        """See `LearnerRole.write_model`."""
        out_dir.mkdir(parents=True, exist_ok=True)
        write_whole(out_dir / "model.json", json.dumps({"weights": self.weights, "learnt": self.learnt}))


def write_whole(path: Path, text: str) -> None:
    """Written or not, never half."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


@dataclass
class DigestWorker:
    """Plays rollouts whose tokens follow from the id and the weights; how long it takes does not."""

    num_slots: int = 4
    longest_seconds: float = 0.004
    # between two tokens
    outcome_of: Callable[[RolloutId, int], float] | None = None
    hangs: Callable[[RolloutOrder], bool] = lambda order: False
    orders: list[RolloutOrder] = field(default_factory=list)
    # that came
    publications: list[Publication] = field(default_factory=list)
    weights: int = 0
    is_interrupted: bool = False

    async def ready(self) -> None:
        """Always."""

    async def publish(self, weights: Publication) -> None:
        """See `RolloutWorker.publish`."""
        version, self.weights = json.loads(Path(weights.path).read_text())
        assert version == weights.version
        self.publications.append(weights)

    async def interrupt(self) -> None:
        """See `RolloutWorker.interrupt`."""
        self.is_interrupted = True

    async def roll(self, order: RolloutOrder, on_partial: OnPartial) -> Rollout | PartialRollout:
        """See `RolloutWorker.roll`: LENGTH tokens, of which the middle one is a tool's."""
        self.orders.append(order)
        if self.hangs(order):
            await asyncio.sleep(1e6)
        asked = str(order.id) if order.again is None else f"{order.id} {order.again}"
        tokens: list[tuple[int, int]] = pickle.loads(order.partial.state) if order.partial is not None else []
        while len(tokens) < LENGTH:
            if self.longest_seconds:
                await asyncio.sleep(random.random() * self.longest_seconds)
            tokens.append((digest(asked, len(tokens), self.weights) % 1000, self.publications[-1].version))
            partial = PartialRollout(order.id, tokens[0][1], len(tokens), pickle.dumps(tokens))
            if self.is_interrupted:
                return partial
            if len(tokens) == LENGTH // 2:
                on_partial(partial)
        return self.finished(order, tokens)

    def finished(self, order: RolloutOrder, tokens: Sequence[tuple[int, int]]) -> Rollout:
        """The rollout of these tokens."""
        ids, versions = (np.array(values, np.int32) for values in zip(*tokens, strict=True))
        is_policy = np.arange(LENGTH) != LENGTH // 2
        outcome = outcome_of(order.id, int(ids.sum())) if self.outcome_of is None else self.outcome_of(order.id, int(ids.sum()))
        return Rollout(
            order.id,
            np.arange(3, dtype=np.int32),
            ids,
            is_policy,
            np.where(is_policy, -1.0, 0.0).astype(np.float32),
            np.where(is_policy, versions, -1).astype(np.int32),
            routes=np.full((3 + LENGTH, 2, 1), int(ids[0]), np.int16),
            rewards={"outcome": outcome, "format": 1.0},
            text=f"answer {ids[-1]}",
        )


def outcome_of(id: RolloutId, total: int) -> float:
    """Differs inside most groups."""
    return 1.0 if id.group % ZERO_VARIANCE_EVERY == 2 else float(id.member == 0 or total % 2)


def failing_outcome_of(id: RolloutId, total: int) -> float:
    """In every other group all fail at first."""
    if id.group % 2 and id.member < GROUP_SIZE:
        return 0.0
    return outcome_of(id, total)


async def report_on(group: Sequence[Rollout]) -> list[AskedAgain]:
    """Three of the attempts."""
    return [AskedAgain(rollout.text, f"not {rollout.text}") for rollout in group]


def streams_of(group: Sequence[ScoredRollout]) -> list[TokenStreams] | None:
    """Advantages are rewards less their mean."""
    rewards = np.array([scored.rollout.rewards["outcome"] for scored in group])
    if np.ptp(rewards) == 0:
        return None
    streams = []
    for scored, advantage in zip(group, rewards - rewards.mean(), strict=True):
        is_policy = scored.rollout.is_policy.astype(np.float32)
        streams.append(TokenStreams(advantage.astype(np.float32) * is_policy, is_policy, 0 * is_policy, 0 * is_policy))
    return streams


def roles_of(config: PostTrainingConfig, *workers: Any, learner: Any = None, scorers: Sequence[Any] = ()) -> Roles:
    """Roles in this process."""
    learner = DigestLearner(Path(config.run_dir)) if learner is None else learner
    worker = DigestWorker(outcome_of=failing_outcome_of if config.recovery else None)
    return Roles(learner, workers or (worker,), scorers, streams_of, SIZES, report_on)


@asynccontextmanager
async def open_roles(config: PostTrainingConfig) -> AsyncIterator[Roles]:
    """What `config.opens` names."""
    yield roles_of(config)


def run_here(
    config: PostTrainingConfig, *workers: Any, stop_after_seconds: float = float("inf"), **roles: Any
) -> SilentReporter:
    """A run in this process."""

    @asynccontextmanager
    async def opened(config: PostTrainingConfig) -> AsyncIterator[Roles]:
        yield roles_of(config, *workers, **roles)

    reporter = SilentReporter()
    Orchestrator(config, opened, reporter).run(stop_after_seconds)
    return reporter


def result_of(config: PostTrainingConfig) -> dict[str, Any]:
    """What a finished run has learnt, and the weights that it ended with."""
    return json.loads((Path(config.out_dir) / "model.json").read_text())


class DyingJournal(Journal):
    """A journal whose process is killed in the middle of writing a certain byte."""

    bytes_left = 1 << 60

    def _write(self, file: Any, content: bytes) -> None:
        if DyingJournal.bytes_left < len(content):
            file.write(content[: DyingJournal.bytes_left])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        DyingJournal.bytes_left -= len(content)
        super()._write(file, content)


def start_run(folder: Path, **changes: Any) -> subprocess.Popen:
    """The run of `config_of` in a process of its own; `dies_after_bytes` of its journal it is killed."""
    command = [sys.executable, "-m", "tests.rl.stand_ins", str(folder), json.dumps(changes)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))})


def main() -> None:
    """See the top of this file."""
    import openkeye.rl.loop

    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    DyingJournal.bytes_left = changes.pop("dies_after_bytes", DyingJournal.bytes_left)
    openkeye.rl.loop.Journal = DyingJournal
    openkeye.rl.loop.LEAST_COMPACTED_BYTES = changes.pop("least_compacted_bytes", 1 << 20)
    Orchestrator(config_of(folder, **changes), open_roles, SilentReporter()).run()


if __name__ == "__main__":
    main()
