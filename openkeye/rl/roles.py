"""What the orchestrator asks of the others: rollout workers, scorers, the learner; and the records that travel between them.

Each role may live in this process or in one of its own (`processes.py`); the calls are the same. Weights never travel in a call
but as a file that is written whole or not at all.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openkeye.rl.rollout import Rollout, RolloutId, TokenStreams

Record = dict[str, float | int | str]


class RoleLost(Exception):
    """The process of a role has died, or hung and was ended. What it was asked for may be asked again."""

    def __init__(self, role: str, why: str, culprit: str = "") -> None:
        """culprit: label of the call that hung, where that is known; other calls of the process were only its neighbours."""
        super().__init__(f"{role}: {why}")
        self.role, self.why, self.culprit = role, why, culprit

    def __reduce__(self) -> tuple[Any, ...]:
        return RoleLost, (self.role, self.why, self.culprit)


@dataclass(frozen=True)
class Publication:
    """Weights that rollouts are sampled with."""

    version: int
    # counts updates: version n has learnt n times
    path: str
    # a file or folder that all roles can read
    rests_on: tuple[str, ...] = ()
    # older files that whoever is behind needs besides, where this one is told as changes to another version
    num_bytes: int = 0
    # that were written


@dataclass(frozen=True)
class AskedAgain:
    """Why a rollout is asked on a longer prompt: an attempt that failed, and what a report says of it."""

    attempt: str
    report: str


@dataclass(frozen=True)
class PartialRollout:
    """What has been sampled of a rollout that is not finished; whoever has it can go on, in another process too."""

    id: RolloutId
    oldest_version: int
    # of the weights that sampled its first token
    num_tokens: int
    # sampled so far
    state: bytes
    # everything that the worker needs to go on: ids, log-probabilities, versions, routes, a pickled environment; its own form


@dataclass(frozen=True)
class RolloutOrder:
    """One rollout to play."""

    id: RolloutId
    attempt: int = 0
    # counts how often this one was begun anew, because what there was of it had become too old
    partial: PartialRollout | None = None
    # to go on from
    is_evaluation: bool = False
    # of the evaluation's sampling settings
    again: AskedAgain | None = None
    # the example is asked with this behind it

    @property
    def label(self) -> str:
        """Names the call, so that whoever hangs can be told from its neighbours."""
        return str(self.id)


@dataclass(frozen=True)
class ScoredRollout:
    """A finished rollout with everything that learning needs of others: rewards, and what teachers think of its tokens."""

    rollout: Rollout
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    # of a scorer's own making; they are kept with the rollout


@dataclass(frozen=True)
class LearnedRollout:
    """A rollout on its way into an update."""

    rollout: Rollout
    streams: TokenStreams
    attempt: int = 0
    again: AskedAgain | None = None
    # what stands in its prompt; None where that is the bare one


@dataclass(frozen=True)
class Update:
    """One optimizer step: from which version, and over what."""

    version: int
    # before the update; the next one is version + 1
    samples: tuple[LearnedRollout, ...]


StreamsOf = Callable[[Sequence[ScoredRollout]], list[TokenStreams] | None]
# the algorithm: of a group's finished rollouts, what each token counts for; None where nothing is to be learnt from them
ReportOn = Callable[[Sequence[Rollout]], Awaitable[list[AskedAgain]]]
# what the rollouts of a group that failed are asked again with; none where nothing can be said without the answer
OnPartial = Callable[[PartialRollout], None]


class RolloutWorker(Protocol):
    """Plays episodes: samples from the policy, steps environments, scores with the task's own rewards."""

    @property
    def num_slots(self) -> int:
        """Rollouts that it plays at once."""
        ...

    async def publish(self, weights: Publication) -> None:
        """Sample with these weights from now on; rollouts under way go on with them.

        Raises:
            RoleLost: the process is gone; a new one is given the weights again.
        """
        ...

    async def roll(self, order: RolloutOrder, on_partial: OnPartial) -> Rollout | PartialRollout:
        """Play one rollout to its end. May be cancelled at any time.

        Args:
            on_partial: told after each turn, or not at all, what could be gone on with.

        Returns:
            the rollout, "failed" where its environment broke; what there is of it where `interrupt` came first.

        Raises:
            RoleLost: the process is gone.
        """
        ...

    async def interrupt(self) -> None:
        """Rollouts under way return what there is of them, soon."""
        ...

    async def ready(self) -> None:
        """Returns when calls are served: at once, or when a lost process has been started again.

        Raises:
            InputError: it cannot be started.
        """
        ...


class ScorerRole(Protocol):
    """Looks at finished rollouts: judges, teachers. Asked as soon as one ends, for many at once."""

    async def score(self, rollout: Rollout) -> ScoredRollout:
        """The rollout with rewards and arrays added; the same for the same rollout.

        Raises:
            RoleLost: the process is gone.
        """
        ...

    async def ready(self) -> None:
        """See `RolloutWorker.ready`."""
        ...


class LearnerRole(Protocol):
    """Trainer ranks. A call at a time."""

    async def open(self) -> int:
        """Load the latest checkpoint of the run, or the first weights; returns the version that it stands at.

        Raises:
            InputError: they cannot be loaded.
            RoleLost: the process is gone.
        """
        ...

    async def step(self, update: Update) -> Record:
        """One optimizer step over all samples; returns figures. Begins at `update.version` and is one further behind it."""
        ...

    async def save(self) -> None:
        """Write a checkpoint; when this returns it is whole and the one that `open` finds."""
        ...

    async def publish(self, path: Path) -> Publication:
        """Write the weights for workers to `path`, atomically."""
        ...

    async def write_model(self, out_dir: Path) -> None:
        """Write the finished model in the published layout."""
        ...

    async def ready(self) -> None:
        """See `RolloutWorker.ready`."""
        ...


@dataclass(frozen=True)
class Roles:
    """Everyone that an orchestrator directs."""

    learner: LearnerRole
    workers: Sequence[RolloutWorker]
    scorers: Sequence[ScorerRole]
    # none: rollouts come with their rewards, and nothing else is to be known
    streams_of: StreamsOf
    task_sizes: Mapping[str, int | None]
    # examples of every task, None for one without end
    report_on: ReportOn | None = None
    # needed where failed groups are asked again

    def __post_init__(self) -> None:
        assert self.workers, "somebody has to play"
