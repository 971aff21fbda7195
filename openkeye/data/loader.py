"""`Loader`: packs of training documents for one rank, step by step, the same ones whoever loads them and however often killed.

sources + mixture ──> lanes (`lane.py`), each reading through workers (`reading_pool.py`) ──> one pack a lane and step
A step has `packs_per_step` lanes over all ranks; rank r of R owns lanes r, r + R, ... A lane knows nothing of ranks.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from openkeye.common.checks import InputError
from openkeye.data.config import LoaderConfig
from openkeye.data.document import Document
from openkeye.data.lane import Lane
from openkeye.data.mixture import Mixture
from openkeye.data.packed_batch import PackedBatch
from openkeye.data.reading import BadSample, InProcessReading, Reading, SampleReader
from openkeye.data.reading_pool import ReadingPool
from openkeye.data.sample import Sample, Source

NUM_STEPS_AHEAD = 2
# ready or being made while the last one computes
MIN_SAMPLES = 20
# read before a share of bad ones means anything
MAX_TOO_LONG_SHARE = 0.5
# nothing is wrong with a sample that another stage has room for, but a stage that leaves out most of them is set wrongly
NUM_NAMED = 5
# bad samples in the message that ends a run
SAME = ("seed", "stage", "packs_per_step", "sources")
# of a state and of the loader that goes on from it: they decide which samples are drawn

logger = logging.getLogger(__name__)


def log_bad(name: str, reason: str) -> None:
    """One line for a sample that is left out."""
    logger.warning("left out: %s: %s", name, reason)


@dataclass(frozen=True)
class LoaderFigures:
    """What was handed out since the stage began, in this rank's lanes."""

    num_steps: int
    num_read: int
    # samples, those left out included
    num_bad: int
    num_too_long: int
    # apart from `num_bad`
    fill_share: float
    # of the packs' capacity that holds tokens
    tokens_by_source: Mapping[str, int]
    # of packs
    wait_seconds: float
    # that `next` waited for packs, since this process began


@dataclass(frozen=True)
class _Step:
    """One step's packs, and where the lanes stand after it."""

    packs: list[PackedBatch]
    lanes: dict[str, Any]


class Loader:
    """Iterates over the steps of a stage: each is the list of this rank's packs, on the CPU, as many on every rank.

    Steps are made ahead on a thread. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        config: LoaderConfig,
        convert: Callable[[Sample], Document],
        rank: int = 0,
        num_ranks: int = 1,
        state: Mapping[str, Any] | None = None,
        on_bad: Callable[[str, str], None] = log_bad,
    ) -> None:
        """
        Args:
            sources: by the names that `config.shares` use; they and `convert` go to worker processes as pickles.
            config: of the stage.
            convert: a sample as a document; an InputError leaves the sample out.
            rank: of this process.
            num_ranks: that train together; divides `config.packs_per_step`.
            state: where to go on: `state()` of one rank alone, or `merge_states` of all, of however many ranks.
            on_bad: told name and reason of each sample left out, on the thread that iterates.

        Raises:
            InputError: settings, mixture or state do not fit together.
        """
        if not 0 <= rank < num_ranks:
            raise InputError(f"rank {rank} of {num_ranks} does not exist: ranks are 0 to {num_ranks - 1}")
        if config.packs_per_step % num_ranks:
            raise InputError(
                f"{config.packs_per_step} packs a step do not divide among {num_ranks} ranks: "
                f"set packs_per_step to a multiple of {num_ranks}, such as {-(-config.packs_per_step // num_ranks) * num_ranks}"
            )
        sizes = {name: source.num_samples for name, source in sources.items()}
        mixture = Mixture(config.shares, sizes, config.seed, config.stage, config.packs_per_step)
        drawn = [share.source for share in config.shares]
        self._identity = {
            "seed": config.seed,
            "stage": config.stage,
            "packs_per_step": config.packs_per_step,
            "sources": {name: sizes[name] for name in drawn},
        }
        self._config = config
        self._on_bad = on_bad
        numbers = range(rank, config.packs_per_step, num_ranks)
        states = {} if state is None else self._checked(state, numbers)
        self._num_steps: int = 0 if state is None else state["step"]
        # handed out
        self._reading = _open_reading(
            SampleReader({name: sources[name] for name in drawn}, convert, config.context), config, len(numbers)
        )
        self._lanes = [
            Lane(number, config, mixture, self._reading, self._count_bad, states.get(str(number))) for number in numbers
        ]
        self._position = {str(lane.number): lane.state() for lane in self._lanes}
        self._news: deque[tuple[int, BadSample]] = deque()
        # bad samples that `on_bad` was not told of, each with the step that met it
        self._last_bad: deque[BadSample] = deque(maxlen=NUM_NAMED)
        self._num_made = self._num_steps
        self._is_whole = True
        self._is_closed = False
        self._executor = ThreadPoolExecutor(1, "openkeye-loader")
        self._steps: deque[Future[_Step]] = deque()
        self._wait_seconds = 0.0

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        return self

    def __next__(self) -> list[PackedBatch]:
        """The next step's packs, in the order of this rank's lanes.

        Raises:
            InputError: more samples are bad than `max_bad_share`.
            RuntimeError: a source or `convert` raised what is no InputError in a worker; without workers, what it raised.
        """
        assert not self._is_closed, "the loader is closed"
        if self._num_steps >= self._config.num_steps:
            raise StopIteration
        begin = time.monotonic()
        self._make_ahead()
        try:
            step = self._steps[0].result()
        finally:
            self._tell_bad()
        self._steps.popleft()
        self._num_steps += 1
        self._position = step.lanes
        self._make_ahead()
        self._wait_seconds += time.monotonic() - begin
        return step.packs

    def __enter__(self) -> Self:
        self._make_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """Where this rank's lanes stand after the step handed out last, as JSON can hold it; see `merge_states`."""
        return json.loads(json.dumps({"step": self._num_steps, **self._identity, "lanes": self._position}))

    def figures(self) -> LoaderFigures:
        """What was handed out so far."""
        lanes = list(self._position.values())
        tokens: dict[str, int] = {}
        for lane in lanes:
            for source, count in lane["tokens_by_source"].items():
                tokens[source] = tokens.get(source, 0) + count
        capacity = sum(lane["num_packs"] for lane in lanes) * self._config.tokens_per_pack
        return LoaderFigures(
            num_steps=self._num_steps,
            num_read=sum(lane["num_read"] for lane in lanes),
            num_bad=sum(lane["num_bad"] for lane in lanes),
            num_too_long=sum(lane["num_too_long"] for lane in lanes),
            fill_share=sum(tokens.values()) / capacity if capacity else 0.0,
            tokens_by_source=tokens,
            wait_seconds=self._wait_seconds,
        )

    def close(self) -> None:
        """End the thread and the workers; what was made ahead is dropped. Safe to call again."""
        self._is_closed = True
        self._reading.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._reading.close()
        self._steps.clear()

    def _checked(self, state: Mapping[str, Any], numbers: Sequence[int]) -> Mapping[str, Any]:
        """The lanes of a state that fits."""
        for name in SAME:
            if state[name] != self._identity[name]:
                raise InputError(
                    f"the loader's state is of {name} {state[name]!r}, the settings say {self._identity[name]!r}: "
                    "go on with the same, or begin the stage anew"
                )
        if missing := [number for number in numbers if str(number) not in state["lanes"]]:
            raise InputError(f"the loader's state lacks lanes {missing}: merge the states of all ranks (`merge_states`)")
        return state["lanes"]

    def _tell_bad(self) -> None:
        """Tell of the bad samples of the steps handed out and of the one about to be."""
        while self._news and self._news[0][0] <= self._num_steps:
            bad = self._news.popleft()[1]
            self._on_bad(bad.name, bad.reason)

    def _make_ahead(self) -> None:
        """Have the thread make the next steps."""
        while len(self._steps) < NUM_STEPS_AHEAD and self._num_steps + len(self._steps) < self._config.num_steps:
            self._steps.append(self._executor.submit(self._make_step))

    # On the loader's thread.

    def _make_step(self) -> _Step:
        if not self._is_whole:
            raise RuntimeError("the loader failed before; make a new one from its state")
        self._is_whole = False
        packs = [lane.next_pack() for lane in self._lanes]
        step = _Step(packs, {str(lane.number): lane.state() for lane in self._lanes})
        self._num_made += 1
        self._is_whole = True
        return step

    def _count_bad(self, bad: BadSample) -> None:
        self._news.append((self._num_made, bad))
        self._last_bad.append(bad)
        num_read = sum(lane.num_read for lane in self._lanes)
        num_bad, num_too_long = (
            sum(counts) for counts in zip(*((one.num_bad, one.num_too_long) for one in self._lanes), strict=True)
        )
        if num_read < MIN_SAMPLES:
            return
        named = "; ".join(f"{bad.name}: {bad.reason}" for bad in self._last_bad)
        if num_bad > self._config.max_bad_share * num_read:
            raise InputError(
                f"{num_bad} of {num_read} samples cannot be used, more than max_bad_share={self._config.max_bad_share:g}: "
                f"mend or remove them, or allow more. The last ones: {named}"
            )
        if num_too_long > MAX_TOO_LONG_SHARE * num_read:
            raise InputError(
                f"{num_too_long} of {num_read} samples are too long for the stage, more than half: give it a longer context, "
                f"or other sources. The last ones: {named}"
            )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks after the same step as one, from which any number of ranks can go on.

    A rank knows only its own lanes. Whoever saves gathers the states first (`torch.distributed.all_gather_object`).

    Raises:
        InputError: they are of different steps or runs, or not of every lane once.
    """
    if not states:
        raise InputError("merge_states got no state; give those of all ranks")
    first = {name: value for name, value in states[0].items() if name != "lanes"}
    lanes = [item for state in states for item in state["lanes"].items()]
    if any({name: value for name, value in state.items() if name != "lanes"} != first for state in states):
        raise InputError(f"loader states of different steps or runs do not merge: steps {[state['step'] for state in states]}")
    numbers = sorted(int(number) for number, _ in lanes)
    if numbers != list(range(first["packs_per_step"])):
        raise InputError(f"loader states have lanes {numbers}, expected each of 0 to {first['packs_per_step'] - 1} once")
    return {**first, "lanes": dict(sorted(lanes, key=lambda item: int(item[0])))}


def _open_reading(reader: SampleReader, config: LoaderConfig, num_lanes: int) -> Reading:
    if config.num_workers == 0:
        return InProcessReading(reader)
    max_held_tokens = config.tokens_per_pack * num_lanes
    return ReadingPool(reader, config.num_workers, max_held_tokens, config.max_read_seconds)
