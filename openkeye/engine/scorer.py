"""`Scorer`: how likely a model finds given tokens, and what it would rather say, in one pass over prompt and output.

Logits are made for slabs of rows and let go: [T, V] never stands in memory. Logarithms are of the model's own logits in
float32, at temperature 1.

Letters: T output tokens, K chosen tokens a row, k likeliest tokens a row, N rows of a slab, V vocabulary, D width.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.device import upload
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.batch_thread import BatchThread
from openkeye.engine.config import SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from openkeye.engine.weight_update import Change, put_changes
from openkeye.inputs.picture_hash import picture_hash
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import Frames, VideoRequest

SLAB_ROWS = 256
# of logits that stand in memory at once
UNUSED = -1
# in chosen ids: its logarithm is -inf


@dataclass(frozen=True)
class Scored:
    """What a model says of an output, row by row: row t judges token t, given everything before it."""

    model: str
    # by whose weights
    logprobs: np.ndarray
    # [T] float32: of the output's own tokens
    chosen: np.ndarray | None
    # [T, K] float32: of the chosen ids, -inf where the id is -1; None where none were given
    top_ids: np.ndarray
    # [T, k] int32: the likeliest tokens, the likeliest first
    top_logprobs: np.ndarray
    # [T, k] float32

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        arrays = (self.logprobs, self.chosen, self.top_ids, self.top_logprobs)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass
class _Job:
    """One output on its way."""

    output_T: np.ndarray
    chosen_TK: np.ndarray | None
    top_k: int
    scored: Scored
    # filled row by row, again where pages were taken away
    model: str = ""
    # whose weights finished it


@dataclass(frozen=True)
class _Judged:
    """Some rows of a job's result, on the device still."""

    job: _Job
    rows: slice
    table: Tensor
    # [N, 1 + K + 2 k] float32: logarithms of the output, of chosen and of the likeliest tokens, and the bits of their int32 ids


@dataclass
class Scorer:
    """An engine that scores, for many callers on one event loop or several. Nobody else may use that engine meanwhile."""

    engine: Engine
    model: str
    # name of the weights; with the ids it names what is remembered
    cache_bytes: int = 64 << 20
    # of results that are remembered
    slab_rows: int = SLAB_ROWS
    num_hits: int = field(default=0, init=False)
    # calls that were answered from memory

    def __post_init__(self) -> None:
        self._jobs: dict[Request, _Job] = {}
        self._known: OrderedDict[bytes, Scored] = OrderedDict()
        # longest unused first; the event loop's side
        self._known_bytes = 0
        self._thread = BatchThread(self.engine, self._run_batch, "openkeye-scorer")

    def close(self) -> None:
        """End the thread; calls under way fail with `StoppedError`."""
        self._thread.stop()

    async def score(
        self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None = None, top_k: int = 0
    ) -> Scored:
        """Score one output; calls that are under way together are batched, and outputs of one prompt read it once.

        Args:
            prompt: laid out by this model's own processor; pictures and videos as anywhere.
            output_ids: [T] tokens behind the prompt, also those of tools and users between turns.
            chosen_ids: [T, K] tokens to score beside each, -1 for none.
            top_k: how many of the likeliest tokens to return.

        Raises:
            InputError: ids of another shape or outside of the vocabulary, or an output that does not fit.
        """
        output_T = np.ascontiguousarray(output_ids, dtype=np.int64)
        chosen_TK = None if chosen_ids is None else np.ascontiguousarray(chosen_ids, dtype=np.int64)
        self._check(output_T, chosen_TK, top_k)
        model = self.model
        key = await asyncio.to_thread(_key, model, prompt, output_T, chosen_TK, top_k)
        if key in self._known:
            self.num_hits += 1
            self._known.move_to_end(key)
            return self._known[key]
        sampling = SamplingParameters(max_new_tokens=1)
        given = output_T[:-1].tolist()
        # The last token is judged by the one before it.
        request = await asyncio.to_thread(Request, prompt, sampling, frozenset(), given_ids=given, waits_for_prefix=True)
        job = self._jobs[request] = _Job(output_T, chosen_TK, top_k, self._empty(output_T, chosen_TK, top_k))
        try:
            await asyncio.wrap_future(self._thread.submit(request))
        except asyncio.CancelledError:
            # Nobody waits for it any more.
            self._thread.call(lambda: self._thread.end(request, RuntimeError("cancelled")))
            raise
        finally:
            self._thread.call(lambda: self._jobs.pop(request, None))
        scored = replace(job.scored, model=job.model)
        if job.model == model:
            self._remember(key, scored)
        return scored

    async def load(self, model: str, changes: Mapping[str, Change]) -> None:
        """Go on with the weights of another model, told as changes to the present ones.

        Calls under way are computed again, whole, by the new weights; await them before where that is not wanted. A name must
        mean the same weights at any time: what is remembered under it is used again.

        Raises:
            InputError: the changes do not fit; nothing has changed then.
        """

        def put() -> None:
            put_changes(self.engine, changes, model)
            self.model = model

        await asyncio.wrap_future(self._thread.call(put))

    def _check(self, output_T: np.ndarray, chosen_TK: np.ndarray | None, top_k: int) -> None:
        vocab_size = self.engine.runner.model.config.vocab_size
        if output_T.ndim != 1 or not len(output_T):
            raise InputError(f"output ids of shape {list(output_T.shape)}; give [T], at least one")
        if chosen_TK is not None and (chosen_TK.ndim != 2 or len(chosen_TK) != len(output_T)):
            raise InputError(f"chosen ids of shape {list(chosen_TK.shape)}; give [{len(output_T)}, K], a row for each token")
        if not 0 <= top_k <= vocab_size:
            raise InputError(f"top_k is {top_k}; give a number from 0 to {vocab_size}")
        for name, ids, lowest in (("output", output_T, 0), ("chosen", chosen_TK, UNUSED)):
            if ids is not None and ids.size and not lowest <= ids.min() <= ids.max() < vocab_size:
                raise InputError(f"{name} ids from {ids.min()} to {ids.max()}; the vocabulary has 0 to {vocab_size - 1}")

    def _empty(self, output_T: np.ndarray, chosen_TK: np.ndarray | None, top_k: int) -> Scored:
        length = len(output_T)
        chosen = None if chosen_TK is None else np.empty(chosen_TK.shape, dtype=np.float32)
        tops = (np.empty((length, top_k), dtype=kind) for kind in (np.int32, np.float32))
        return Scored(self.model, np.empty(length, dtype=np.float32), chosen, *tops)

    def _remember(self, key: bytes, scored: Scored) -> None:
        if key in self._known:
            return
        self._known[key] = scored
        self._known_bytes += scored.nbytes
        while self._known_bytes > self.cache_bytes:
            self._known_bytes -= self._known.popitem(last=False)[1].nbytes

    # On the thread.

    def _run_batch(self, batch: Batch) -> list[Request]:
        runner, scheduler = self.engine.runner, self.engine.scheduler
        hidden_TD = runner.run_hidden(batch)
        finished, judged, first = [], [], 0
        for segment in batch.segments:
            segment.request.num_computed += segment.count
            scheduler.keep_full_pages(segment.request, segment.start)
            judged += self._judge_segment(segment, hidden_TD, first)
            first += segment.count
            if not segment.request.num_missing:
                self._jobs[segment.request].model = self.model
                finished.append(segment.request)
        _keep(judged)
        for request in finished:
            scheduler.remove(request)
        return finished

    @torch.inference_mode()
    def _judge_segment(self, segment: Segment, hidden_TD: Tensor, first: int) -> list[_Judged]:
        """Of the tokens that this segment's rows, from `first` on, judge: the prompt's last token judges the output's first."""
        before = segment.request.num_prompt - 1
        job, judged = self._jobs[segment.request], []
        for start in range(max(segment.start, before), segment.end, self.slab_rows):
            stop = min(start + self.slab_rows, segment.end)
            rows_N = torch.arange(start, stop) - segment.start + first
            logits_NV = self.engine.runner.logits(hidden_TD, rows_N)
            rows = slice(start - before, stop - before)
            judged.append(_Judged(job, rows, _judge(job, rows, logits_NV.float())))
        return judged


def _judge(job: _Job, rows: slice, logits_NV: Tensor) -> Tensor:
    """See `_Judged.table`. Nothing here waits for the device."""
    sums_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    ids = job.output_T[rows, None]
    if job.chosen_TK is not None:
        ids = np.concatenate([ids, job.chosen_TK[rows].clip(min=0)], axis=1)
    parts = [logits_NV.gather(1, upload(torch.from_numpy(ids), logits_NV.device)) - sums_N1]
    if job.top_k:
        values, top_ids = logits_NV.topk(job.top_k, dim=-1)
        parts += [values - sums_N1, top_ids.int().view(torch.float32)]
    return torch.cat(parts, dim=1)


def _keep(judged: Sequence[_Judged]) -> None:
    """Write all rows of a batch into their results, in one read from the device."""
    if not judged:
        return
    flat = torch.cat([one.table.flatten() for one in judged]).cpu().numpy()
    start = 0
    for one in judged:
        scored, chosen_TK, top_k = one.job.scored, one.job.chosen_TK, one.job.top_k
        table, start = flat[start : start + one.table.numel()].reshape(one.table.shape), start + one.table.numel()
        scored.logprobs[one.rows] = table[:, 0]
        num_chosen = 0
        if chosen_TK is not None:
            assert scored.chosen is not None
            num_chosen = chosen_TK.shape[1]
            scored.chosen[one.rows] = np.where(chosen_TK[one.rows] == UNUSED, -np.inf, table[:, 1 : 1 + num_chosen])
        scored.top_logprobs[one.rows] = table[:, 1 + num_chosen : 1 + num_chosen + top_k]
        scored.top_ids[one.rows] = table[:, 1 + num_chosen + top_k :].view(np.int32)


def _key(model: str, prompt: Prompt, output_T: np.ndarray, chosen_TK: np.ndarray | None, top_k: int) -> bytes:
    """Names a result: model, prompt with its pixels, output and support."""
    content = hashlib.blake2b(f"{model}\n{top_k}".encode(), digest_size=16)
    content.update(prompt.model_input.input_ids.numpy().tobytes())
    for item in prompt.media:
        content.update(_name_of(item).encode())
    for ids in (output_T, chosen_TK):
        content.update(b"-" if ids is None else f"{ids.shape}".encode() + ids.tobytes())
    return content.digest()


def _name_of(item: np.ndarray | Frames | VideoRequest) -> str:
    if isinstance(item, VideoRequest):
        return f"{item.source} {item.plan} {item.frame_numbers.tolist()}"
    return " ".join(item.hashes if isinstance(item, Frames) else [picture_hash(item)])
