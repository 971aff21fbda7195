"""`PolicyEngine`: the policy that many rollouts sample from at once, its weights replaced while they are under way.

sample ─┐                                   ┌─> ids, log-probabilities, versions, routes
sample ─┼─> one engine on a thread of its own ┤
publish ┘   (batches; orders between them)   └─> interrupted: plain data, which goes on anywhere

Letters: P prompt tokens, G tokens given behind it, T sampled tokens, L layers, K experts a token.
"""

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from openkeye.agents.model_client import Message
from openkeye.common.checks import InputError
from openkeye.engine.batch_thread import BatchThread
from openkeye.engine.config import SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.recorded_answer import Picks, RecordedAnswer
from openkeye.engine.request import Request
from openkeye.engine.update_file import read_update, updates_from
from openkeye.engine.weight_update import Change, WeightUpdate, apply_update
from openkeye.inputs.encode import assemble, lay_out
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import VideoRequest, read_request
from openkeye.rl.rollout import RolloutId

KEYS_AFTER_UPDATE = ("recompute", "keep")


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy is sampled."""

    seed: int = 0
    # of the run: with a rollout's id it decides all its draws
    keys_after_update: str = "recompute"
    # of unfinished rollouts. "recompute": their tokens stay, and their keys are made again by the new weights. "keep": they go
    # on over the keys they have (`SampledTurn.has_mixed_keys`), which costs nothing and is another policy than either.
    flushes_after_update: bool = False
    # Pages and pictures of older weights are forgotten at once, not when room is needed; found they are never.

    def __post_init__(self) -> None:
        if self.keys_after_update not in KEYS_AFTER_UPDATE:
            raise InputError(f"keys_after_update is {self.keys_after_update!r}; give one of {', '.join(KEYS_AFTER_UPDATE)}")


@dataclass(frozen=True)
class PartialTurn:
    """A turn that was interrupted: plain data, with which `PolicyEngine.sample` goes on, in this process or another."""

    ids: np.ndarray
    # [T] int32, none of them ends the turn
    logprobs: np.ndarray
    # [T] float32
    versions: np.ndarray
    # [T] int32
    routes: np.ndarray | None = None
    # [S, L, K] int16 of the first tokens of prompt, given tokens and these; None where nothing is recorded or computed
    has_mixed_keys: bool = False
    picks: Picks | None = None
    # of tokens of prompt, given tokens and these; None where none were kept


@dataclass(frozen=True)
class SampledTurn:
    """What the policy said, up to the end of its turn."""

    ids: np.ndarray
    # [T] int32, with the token that ends the turn where one does
    logprobs: np.ndarray
    # [T] float32, at temperature 1
    versions: np.ndarray
    # [T] int32
    routes: np.ndarray | None
    # [P + G + T, L, K] int16, -1 where unknown: the last token was never computed
    finish_reason: str
    # "stop" or "length"
    has_mixed_keys: bool = False
    # whether some tokens were sampled over keys that older weights had made
    num_cached_tokens: int = 0
    # of prompt and given tokens, found in the prefix cache
    picks: Picks | None = None
    # of some of the tokens that chose these (`EngineConfig.records_picks_every`)


class TurnInterrupted(Exception):
    """A turn was cut by `PolicyEngine.interrupt`; `partial` goes on."""

    def __init__(self, partial: PartialTurn) -> None:
        super().__init__(f"interrupted after {len(partial.ids)} tokens")
        self.partial = partial


class PolicyEngine:
    """An `Engine` with a version, for many callers on one event loop or several. Nobody else may use that engine meanwhile."""

    def __init__(self, engine: Engine, config: PolicyConfig | None = None, version: int = 0) -> None:
        """version: of the weights that the engine has loaded.

        Routes and selected keys are recorded where the engine's `EngineConfig` says so.
        """
        self._engine = engine
        engine.version = version
        self.config = config or PolicyConfig()
        self._id_of: dict[Request, RolloutId] = {}
        self._interruptions: list[Collection[RolloutId] | None] = []
        # whom each was for; the thread's own
        self._thread = BatchThread(engine, engine.run_batch, "openkeye-policy")

    @property
    def processor(self) -> Processor:
        return self._engine.processor

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return self._engine.stop_ids

    @property
    def version(self) -> int:
        """Of the weights that the next token is sampled with."""
        return self._engine.version

    @property
    def num_interruptions(self) -> int:
        """So far."""
        return len(self._interruptions)

    def was_interrupted(self, id: RolloutId, since: int) -> bool:
        """Whether a rollout was meant by an interruption since there were so many."""
        return any(ids is None or id in ids for ids in self._interruptions[since:])

    def close(self) -> None:
        """End the thread; samples under way fail with `StoppedError`."""
        self._thread.stop()

    async def lay_out(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """The prompt of a conversation, every picture of it decoded, for any number of rollouts.

        Raises:
            InputError: unreadable media, or a prompt past the model's context.
        """
        return await asyncio.to_thread(lay_out_prompt, messages, self.processor, tools)

    async def sample(
        self,
        prompt: Prompt,
        sampling: SamplingParameters,
        id: RolloutId,
        *,
        given_ids: Sequence[int] | np.ndarray = (),
        partial: PartialTurn | None = None,
    ) -> SampledTurn:
        """The policy's next turn. Calls that are under way together are batched.

        Members of a group that share a prompt read it once, as far as it fills pages of the prefix cache. What is drawn depends
        on the id, the run's seed and the place alone: `sampling.seed` is not used.

        Args:
            prompt: how the conversation begins.
            sampling: `max_new_tokens` counts those of `partial` too, and is cut where the context ends.
            given_ids: [G] tokens behind the prompt: earlier turns, and what the template wrote between them.
            partial: the beginning of this turn, from an interruption.

        Raises:
            InputError: no room for one token in the context or in the engine's pages, or stop strings.
            TurnInterrupted: by `interrupt`.
        """
        since = self.num_interruptions
        request = await asyncio.to_thread(self._request, prompt, sampling, id, given_ids, partial)

        def check() -> None:
            # Whoever interrupts means those too that are just being laid out.
            if self.was_interrupted(id, since):
                raise TurnInterrupted(_partial_of(request))

        self._id_of[request] = id
        try:
            await asyncio.wrap_future(self._thread.submit(request, check))
        except asyncio.CancelledError:
            # Nobody waits for it any more.
            self._thread.call(lambda: self._thread.end(request, TurnInterrupted(_partial_of(request))))
            raise
        finally:
            del self._id_of[request]
        return _turn_of(request)

    async def interrupt(self, ids: Collection[RolloutId] | None = None) -> dict[RolloutId, PartialTurn]:
        """End unfinished turns, all or those of some rollouts, before the next batch.

        Their `sample` raises `TurnInterrupted`; what they have is returned here too, but of turns that have not reached the
        engine. An episode whose environment acts meanwhile is cut before its next turn.
        """
        return await asyncio.wrap_future(self._thread.call(lambda: self._interrupt(ids)))

    async def publish(
        self,
        version: int,
        tensors: Mapping[str, Change] | Iterable[tuple[str, Tensor]],
        base: int | None = None,
        interrupts: bool = False,
    ) -> dict[RolloutId, PartialTurn]:
        """Go on with new weights from the next batch on.

        Unfinished turns keep their tokens and go on under the new weights (`PolicyConfig.keys_after_update`), each token with
        the version that sampled it. Pages and pictures of older weights serve nobody any more.

        Args:
            version: above the present one.
            tensors: by published name; those that stay may be left out. With a base they may be deltas
                (`weight_update.changes_between`).
            base: the version that deltas change, the present one.
            interrupts: unfinished turns are ended and handed out, as by `interrupt`, before the weights change.

        Raises:
            InputError: the update does not fit; nothing has changed then.
        """
        changes = tensors if isinstance(tensors, Mapping) else dict(tensors)
        return await self._put(WeightUpdate(version, changes, base), interrupts)

    async def publish_file(self, path: str | Path, interrupts: bool = False) -> dict[RolloutId, PartialTurn]:
        """`publish` from a file of `update_file.write_update`, which is read and checked while sampling goes on."""
        return await self._put(await asyncio.to_thread(read_update, path), interrupts)

    async def publish_folder(self, folder: str | Path) -> int:
        """Go on with the newest weights of a folder of updates, where there are newer ones; returns the version."""
        for path in await asyncio.to_thread(updates_from, folder, self.version):
            await self.publish_file(path)
        return self.version

    async def hold(self) -> None:
        """Sample nothing from the batch under way on until `go_on`; orders are carried out meanwhile."""
        await self._set_held(True)

    async def go_on(self) -> None:
        """End `hold`."""
        await self._set_held(False)

    async def _set_held(self, is_held: bool) -> None:
        await asyncio.wrap_future(self._thread.call(lambda: setattr(self._thread, "is_held", is_held)))

    def _request(
        self,
        prompt: Prompt,
        sampling: SamplingParameters,
        id: RolloutId,
        given_ids: Sequence[int] | np.ndarray,
        partial: PartialTurn | None,
    ) -> Request:
        if sampling.stop:
            raise InputError(f"stop strings {sampling.stop} in a rollout, which its end token ends; leave them out")
        given = np.asarray(given_ids, dtype=np.int64).tolist()
        record = RecordedAnswer()
        if partial is not None:
            given += partial.ids.tolist()
            record = RecordedAnswer(
                partial.ids.tolist(),
                partial.logprobs.tolist(),
                partial.versions.tolist(),
                partial.routes,
                partial.has_mixed_keys,
                partial.picks,
            )
        num_known, most = prompt.num_tokens + len(given), self.processor.max_tokens
        num_new = sampling.max_new_tokens - len(record.ids)
        num_new = num_new if most is None else min(num_new, most - num_known)
        if num_new < 1:
            raise InputError(
                f"{id}: {num_known:,} tokens leave no room for one of {sampling.max_new_tokens:,} more in a context of "
                f"{most or num_known:,}; end the rollout before"
            )
        sampling = replace(sampling, max_new_tokens=num_new, seed=seed_of(self.config.seed, id))
        return Request(
            prompt, sampling, self.stop_ids, given_ids=given, record=record, waits_for_prefix=True, keeps_answer=True
        )

    # On the thread.

    def _interrupt(self, ids: Collection[RolloutId] | None) -> dict[RolloutId, PartialTurn]:
        partials = {}
        self._interruptions.append(ids)
        for request in self._thread.requests:
            id = self._id_of.get(request)
            # (one without an id has been left by its caller just now)
            if id is not None and (ids is None or id in ids):
                self._engine.keep_routes(request)
                partials[id] = _partial_of(request)
                self._thread.end(request, TurnInterrupted(partials[id]))
        return partials

    async def _put(self, update: WeightUpdate, interrupts: bool) -> dict[RolloutId, PartialTurn]:
        def put() -> dict[RolloutId, PartialTurn]:
            partials = self._interrupt(None) if interrupts else {}
            keeps_keys = self.config.keys_after_update == "keep"
            for request in [] if keeps_keys else self._thread.requests:
                self._engine.keep_routes(request)
            apply_update(self._engine, update, keeps_keys, self.config.flushes_after_update)
            return partials

        return await asyncio.wrap_future(self._thread.call(put))


def lay_out_prompt(messages: Sequence[Message], processor: Processor, tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
    """See `PolicyEngine.lay_out`. A learner that lays the same messages out gets the same tokens, positions and pixels."""
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    prompt = lay_out(messages, processor, num_reserved_tokens=1, **options)
    if not any(isinstance(item, VideoRequest) for item in prompt.media):
        return prompt
    media = [read_request(item) if isinstance(item, VideoRequest) else item for item in prompt.media]
    # Where frames are missing, so are their tokens.
    return assemble(prompt.template_ids, media, processor, prompt.text)


def seed_of(seed: int, id: RolloutId) -> int:
    """The seed of one rollout in a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest(), "big")


def _partial_of(request: Request) -> PartialTurn:
    record = request.record
    assert record is not None
    return PartialTurn(
        np.array(record.ids, dtype=np.int32),
        np.array(record.logprobs, dtype=np.float32),
        np.array(record.versions, dtype=np.int32),
        record.routes_SLK,
        record.has_mixed_keys,
        record.all_picks(),
    )


def _turn_of(request: Request) -> SampledTurn:
    """A finished request's turn."""
    partial, reason = _partial_of(request), request.finish_reason
    assert reason is not None
    # The token that ends a turn is none of the request's.
    num_tokens = request.num_known + (reason == "stop")
    routes = partial.routes
    if routes is not None:
        unknown = np.full((num_tokens - len(routes), *routes.shape[1:]), -1, dtype=np.int16)
        routes = np.concatenate([routes, unknown])
    return SampledTurn(
        partial.ids,
        partial.logprobs,
        partial.versions,
        routes,
        reason,
        partial.has_mixed_keys,
        request.num_cached,
        partial.picks,
    )
