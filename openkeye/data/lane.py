"""`Lane`: one sequence of packs, the same on whichever rank it runs.

mixture ──> draws ahead, being read ──> documents that wait ──> best fit ──> one pack a step
Everything that decides the next pack is in `Lane.state`: what was drawn, and which documents still wait.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from openkeye.data.config import LoaderConfig
from openkeye.data.document import Document
from openkeye.data.mixture import Draw, Mixture
from openkeye.data.packed_batch import PackedBatch, pack
from openkeye.data.packing import DocumentCost, fill_pack
from openkeye.data.reading import BadSample, Reading

NUM_AHEAD = 32
# samples drawn and not yet needed, so that several workers have something to read
LOOKAHEAD_PACKS = 4
# packs' worth of tokens that wait when a pack is chosen from them: where documents are about as long as packs, 2 leave 12% of
# the capacity empty and 4 leave 5%. They are in memory, pictures and all.


class Lane:
    """Draws, waits, packs. Its owner calls `next_pack` once a step."""

    def __init__(
        self,
        number: int,
        config: LoaderConfig,
        mixture: Mixture,
        reading: Reading,
        on_bad: Callable[[BadSample], None],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            number: of all ranks' lanes, 0-based.
            config: of the stage.
            mixture: of the stage.
            reading: where samples are read.
            on_bad: called for each that is left out, after it is counted; what it raises ends `next_pack`.
            state: of the same lane, as `state` gave it.
        """
        state = state or {}
        self.number = number
        self._config = config
        self._mixture = mixture
        self._reading = reading
        self._on_bad = on_bad
        self._cost = DocumentCost(config.top_k)
        self._drawn_by_source: dict[str, int] = dict(state.get("drawn_by_source", {}))
        self._tokens_by_source: dict[str, int] = dict(state.get("tokens_by_source", {}))
        # of packs
        self.num_packs: int = state.get("num_packs", 0)
        self._num_packed: int = state.get("num_packed", 0)
        # documents in them
        self.num_read: int = state.get("num_read", 0)
        self.num_bad: int = state.get("num_bad", 0)
        self.num_too_long: int = state.get("num_too_long", 0)
        self._ahead: deque[tuple[Draw, int]] = deque()
        # with the number that `Reading.submit` gave
        self._waiting: list[tuple[Draw, Document]] = []
        # the oldest first
        self._num_tokens_waiting = 0
        for source, index in [*state.get("waiting", ()), *state.get("ahead", ())]:
            draw = Draw(source, index)
            self._ahead.append((draw, reading.submit(draw)))
        self._num_to_restore = len(state.get("waiting", ()))
        # at the head of `_ahead`: they waited already, and are read again
        self._draw_ahead()

    def next_pack(self) -> PackedBatch:
        """The lane's next pack."""
        capacity = self._config.tokens_per_pack
        while self._num_to_restore:
            self._num_to_restore -= 1
            self._read(is_first_time=False)
        while self._num_tokens_waiting < LOOKAHEAD_PACKS * capacity:
            self._read(is_first_time=True)
            self._draw_ahead()
        chosen = fill_pack([document.num_tokens for _, document in self._waiting], capacity, self._cost)
        members = [self._waiting[place] for place in chosen]
        taken = set(chosen)
        self._waiting = [entry for place, entry in enumerate(self._waiting) if place not in taken]
        for draw, document in members:
            self._tokens_by_source[draw.source] = self._tokens_by_source.get(draw.source, 0) + document.num_tokens
            self._num_tokens_waiting -= document.num_tokens
        self._num_packed += len(members)
        self.num_packs += 1
        return pack([document for _, document in members])

    def state(self) -> dict[str, Any]:
        """What JSON can hold of the lane after its last pack; samples by source and number."""
        waiting = [[draw.source, draw.index] for draw, _ in self._waiting]
        ahead = [[draw.source, draw.index] for draw, _ in self._ahead]
        return {
            "num_packs": self.num_packs,
            "num_packed": self._num_packed,
            "num_read": self.num_read,
            "num_bad": self.num_bad,
            "num_too_long": self.num_too_long,
            "drawn_by_source": dict(self._drawn_by_source),
            "tokens_by_source": dict(self._tokens_by_source),
            "waiting": [*waiting, *ahead[: self._num_to_restore]],
            "ahead": ahead[self._num_to_restore :],
        }

    def _read(self, is_first_time: bool) -> None:
        """The next sample that was drawn joins those that wait, or is left out."""
        draw, number = self._ahead.popleft()
        outcome = self._reading.take(number)
        self.num_read += is_first_time
        if isinstance(outcome, Document):
            self._waiting.append((draw, outcome))
            self._num_tokens_waiting += outcome.num_tokens
            return
        self.num_too_long += outcome.is_too_long
        self.num_bad += not outcome.is_too_long
        self._on_bad(outcome)

    def _draw_ahead(self) -> None:
        """Keep so many draws ahead. How many must not depend on workers or ranks: weights change with the step."""
        while len(self._ahead) - self._num_to_restore < NUM_AHEAD:
            draw = self._mixture.draw(self.number, self._drawn_by_source, self._progress())
            self._drawn_by_source[draw.source] = self._drawn_by_source.get(draw.source, 0) + 1
            self._ahead.append((draw, self._reading.submit(draw)))

    def _progress(self) -> float:
        """Through the stage, 0 to 1, at the step that the next draw will probably be part of.

        That many documents before it are still to be packed, as many a step as so far (one, before anything is known).
        """
        num_before = len(self._ahead) + len(self._waiting)
        step = self.num_packs + num_before * (1 + self.num_packs) / (1 + self._num_packed)
        return min(1.0, step / max(1, self._config.num_steps - 1))
