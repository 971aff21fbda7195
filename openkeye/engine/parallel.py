"""One engine over several ranks: the leader's runner turns each model call into an order, `follow` carries the orders out.

Rank 0 schedules, embeds and samples; it sends the others where new tokens stand (segments and pages), their positions and their
embeddings, and all walk the decoder, each over its own heads and experts. Pictures are shared out among the ranks.

Letters: T new tokens, N rows, V vocabulary.
"""

import signal
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.launch import local_rank, num_ranks, rank
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.evidence import EvidenceCounts
from openkeye.engine.graphs import StepRow
from openkeye.engine.pages import with_cache_tokens
from openkeye.engine.ranks import End, Ranks, join
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.sharded_past import ShardedPast
from openkeye.inputs.patches import Patches
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import ALONE, Shard, local_config
from openkeye.model.weights import load_model


@dataclass(frozen=True)
class ModelSettings:
    """Everything that a runner is made from."""

    model_dir: str
    device: torch.device
    dtype: torch.dtype
    attention: str
    config: EngineConfig

    def load(self, shard: Shard) -> tuple[KeyeModel, EngineConfig]:
        """One rank's part, and the settings with the number of cache tokens that it has room for.

        Raises:
            InputError: no checkpoint that so many ranks can share, or no room for a page.
        """
        are_e4m3 = self.config.experts == "e4m3"
        model = load_model(self.model_dir, self.device, self.dtype, are_experts_e4m3=are_e4m3, shard=shard)
        local = local_config(model.config, shard.size)
        return model, with_cache_tokens(self.config, local, self.device, self.dtype, self.attention)


# What the leader tells; `number` is the runner's.


@dataclass(frozen=True)
class Open:
    """Load a model."""

    number: int
    settings: ModelSettings


@dataclass(frozen=True)
class Opened:
    """A follower's answer to `Open`."""

    error: str | None
    # one line, where the checkpoint cannot be used
    cache_tokens: int | None
    # for which there is room


@dataclass(frozen=True)
class Begin:
    """Make the caches, on all ranks for as many tokens."""

    number: int
    cache_tokens: int


@dataclass(frozen=True)
class Close:
    """Let a model go."""

    number: int


@dataclass(frozen=True)
class PagesOrder:
    """A request's pages, of which the follower knows some."""

    key: int
    # of the request
    num_known: int
    new: list[int]


@dataclass(frozen=True)
class SegmentOrder:
    """A `Segment`."""

    pages: PagesOrder
    start: int
    count: int
    num_known: int
    # tokens of the request
    num_prompt: int | None
    # of it, where its evidence is counted


@dataclass(frozen=True)
class Walk:
    """Run the decoder; the embeddings of all tokens follow as a tensor."""

    number: int
    segments: list[SegmentOrder]
    num_padded: int
    is_prompt: bool
    # see `Batch`
    position_ids: np.ndarray
    # [3, T] int64


@dataclass(frozen=True)
class Replay:
    """Run a captured step of decoding."""

    number: int
    rows: list[tuple[PagesOrder, int, int, int, int]]
    # token, position, slot and length of a `StepRow` behind its request's pages


@dataclass(frozen=True)
class Logits:
    """Multiply rows of the last hidden states with the own part of the head."""

    number: int
    rows: np.ndarray
    # [N] int64


@dataclass(frozen=True)
class Encode:
    """Encode pictures; their pixels follow as a tensor, and the vectors go back."""

    number: int
    grids: list[np.ndarray]
    # of each rank's pictures: [pictures, 3] int64


class ShardedRunner(Runner):
    """A runner of one rank's part, as followers have it."""

    def past_of(self, batch: Batch) -> ShardedPast:
        """See `Runner.past_of`."""
        top_k = self.model.config.indexer.top_k
        keeps = (batch.keeps_evidence, self.keeps_picks)
        past = ShardedPast(batch, self.caches, self.attention, top_k, self.dense_up_to, *keeps)
        past.shard = self.model.shard
        return past


class LeadingRunner(ShardedRunner):
    """The leader's runner: nobody who uses it need know of the others."""

    ranks: Ranks
    number: int

    def lead(self, ranks: Ranks, number: int) -> None:
        """Begin to give orders, as the runner of this number."""
        self.ranks, self.number = ranks, number
        self._pages_told: dict[int, tuple[list[int], int]] = {}
        # by the request's key, of the batch before: its list of pages, which only grows while the request runs, and how many

    def walk(self, batch: Batch, embeds_TD: Tensor, position_ids_3T: Tensor) -> Tensor:
        """See `Runner.walk`."""
        order = Walk(self.number, self._segments(batch), batch.num_padded, batch.is_prompt, position_ids_3T.numpy())
        with self.ranks.in_step():
            self.ranks.tell(order)
            dist.broadcast(embeds_TD, src=0)
            return super().walk(batch, embeds_TD, position_ids_3T)

    def replay(self, rows: list[StepRow]) -> Tensor:
        """See `Runner.replay`."""
        told, self._pages_told = self._pages_told, {}
        orders = [(self._pages(row.request, told), row.token, row.position, row.slot, row.length) for row in rows]
        with self.ranks.in_step():
            self.ranks.tell(Replay(self.number, orders))
            return super().replay(rows)

    def logits(self, hidden_TD: Tensor, rows_N: Tensor) -> Tensor:
        """See `Runner.logits`."""
        with self.ranks.in_step():
            self.ranks.tell(Logits(self.number, rows_N.numpy()))
            return super().logits(hidden_TD, rows_N)

    def encode(self, patches: Patches) -> Tensor:
        """See `Runner.encode`; each rank encodes neighbouring pictures."""
        num_pictures, size = patches.grid_thw.shape[0], self.model.shard.size
        if num_pictures < size:
            return super().encode(patches)
        cuts = [num_pictures * other // size for other in range(size + 1)]
        shares = [patches.slice_pictures(cuts[other], cuts[other + 1]) for other in range(size)]
        with self.ranks.in_step():
            self.ranks.tell(Encode(self.number, [share.grid_thw.numpy() for share in shares]))
            for other in range(1, size):
                dist.send(shares[other].pixels.contiguous(), dst=other)
            parts = [super().encode(shares[0])]
            for other in range(1, size):
                parts.append(parts[0].new_empty(self._num_merged(shares[other].grid_thw), parts[0].shape[1]))
                dist.recv(parts[other], src=other)
        return torch.cat(parts)

    def _num_merged(self, grid_thw: Tensor) -> int:
        """Vectors that pictures of these grids become."""
        vision = self.model.config.vision
        assert vision is not None
        return int(grid_thw.prod(dim=1).sum()) // vision.spatial_merge_size**2

    def _segments(self, batch: Batch) -> list[SegmentOrder]:
        """A batch in words; followers know the pages of the requests of the batch before, and no others."""
        told, self._pages_told = self._pages_told, {}
        return [self._segment(segment, told) for segment in batch.segments]

    def _segment(self, segment: Segment, told: dict[int, tuple[list[int], int]]) -> SegmentOrder:
        request = segment.request
        num_prompt = None if request.evidence is None else request.num_prompt
        return SegmentOrder(self._pages(request, told), segment.start, segment.count, request.num_known, num_prompt)

    def _pages(self, request: Request, told: dict[int, tuple[list[int], int]]) -> PagesOrder:
        """Whatever the follower was not told with the batch before."""
        key, pages = id(request), request.pages
        known, num_known = told.get(key, (pages, 0))
        # After a preemption, and where another request has the key now, the list is another.
        num_known = num_known if known is pages else 0
        self._pages_told[key] = (pages, len(pages))
        return PagesOrder(key, num_known, pages[num_known:])


@dataclass(eq=False)
class _Known:
    """What a follower knows of a request: as much as a `StepRow` and a `PagedPast` ask of one."""

    pages: list[int] = field(default_factory=list)
    slots: Tensor | None = None
    # [pages * page_size] int64, of the pages that a walk has seen
    num_known: int = 0
    evidence: EvidenceCounts | None = None
    # takes part in the leader's counting; nobody reads it here

    def slots_of(self, page_size: int, device: torch.device) -> Tensor:
        """Cache slots of all pages."""
        num_done = 0 if self.slots is None else self.slots.shape[0] // page_size
        if num_done < len(self.pages):
            starts = torch.tensor(self.pages[num_done:], dtype=torch.int64, device=device) * page_size
            slots = (starts[:, None] + torch.arange(page_size, device=device)).flatten()
            self.slots = slots if self.slots is None else torch.cat([self.slots, slots])
        assert self.slots is not None
        return self.slots


class _Follower:
    """A follower's runner, and what it knows of the requests."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.requests: dict[int, _Known] = {}
        # by key, those of the batch before
        self.hidden_TD = torch.empty(0)

    def walk(self, order: Walk) -> None:
        """Carry out the order."""
        runner = self.runner
        num_tokens, width = order.position_ids.shape[1], runner.model.config.hidden_size
        requests = self._learn([segment.pages for segment in order.segments])
        pairs = zip(order.segments, requests, strict=True)
        segments = [self._segment(segment, request) for segment, request in pairs]
        batch = Batch(segments, order.num_padded, order.is_prompt)
        embeds = torch.empty(num_tokens, width, device=runner.device, dtype=runner.dtype)
        dist.broadcast(embeds, src=0)
        self.hidden_TD = runner.walk(batch, embeds, torch.from_numpy(order.position_ids))

    def replay(self, order: Replay) -> None:
        """Carry out the order."""
        requests = self._learn([pages for pages, *_ in order.rows])
        # The graphs only read a request's pages.
        rows = [StepRow(request, *row[1:]) for request, row in zip(requests, order.rows, strict=True)]  # type: ignore[arg-type]
        self.runner.replay(rows)

    def logits(self, order: Logits) -> None:
        """Carry out the order."""
        self.runner.logits(self.hidden_TD, torch.from_numpy(order.rows))

    def encode(self, order: Encode) -> None:
        """Carry out the order."""
        runner, grid_thw = self.runner, torch.from_numpy(order.grids[self.runner.model.shard.rank])
        vision = runner.model.config.vision
        assert vision is not None
        shape = (int(grid_thw.prod(dim=1).sum()), vision.num_channels, vision.patch_size, vision.patch_size)
        pixels = torch.empty(shape, device=runner.device, dtype=runner.dtype)
        dist.recv(pixels, src=0)
        dist.send(runner.encode(Patches(pixels, grid_thw)).contiguous(), dst=0)

    def _learn(self, orders: list[PagesOrder]) -> list[_Known]:
        """The requests of a batch; those of the batch before that are not in it are forgotten."""
        before, self.requests = self.requests, {}
        for order in orders:
            request = before[order.key] if order.num_known else _Known()
            # In place: the list is the same while the request keeps its pages.
            request.pages += order.new
            self.requests[order.key] = request
        return list(self.requests.values())

    def _segment(self, order: SegmentOrder, request: _Known) -> Segment:
        slots = request.slots_of(self.runner.caches.page_size, self.runner.device)
        request.num_known = order.num_known
        request.evidence = None if order.num_prompt is None else EvidenceCounts(order.num_prompt)
        return Segment(request, order.start, order.count, slots[: order.start + order.count])  # type: ignore[arg-type]


_numbers = iter(range(1 << 62))


def open_runner(settings: ModelSettings) -> Runner:
    """A runner of a whole model: alone, or as the leader of the ranks that torchrun started.

    Raises:
        InputError: the checkpoint cannot be used or shared, GPUs are missing, or this process is a follower.
    """
    if num_ranks() == 1:
        return Runner(*settings.load(ALONE), settings.attention)
    if rank():
        raise InputError(f"rank {rank()} of {num_ranks()} follows rank 0; call openkeye.engine.parallel.follow() there")
    if settings.device.type == "cuda" and torch.cuda.device_count() < num_ranks():
        raise InputError(
            f"{num_ranks()} ranks need a GPU each, PyTorch sees {torch.cuda.device_count()}; start fewer or give --device cpu"
        )
    ranks, number = join(), next(_numbers)
    ranks.tell(Open(number, settings))
    errors = []
    try:
        model, config = settings.load(ranks.shard)
    except InputError as error:
        errors.append(str(error))
    answers = [ranks.hear() for _ in range(1, ranks.shard.size)]
    errors += [answer.error for answer in answers if answer.error is not None]
    if errors:
        ranks.tell_later(Close(number))
        raise InputError(errors[0])
    cache_tokens = min(tokens for tokens in (config.cache_tokens, *(answer.cache_tokens for answer in answers)) if tokens)
    ranks.tell(Begin(number, cache_tokens))
    runner = LeadingRunner(model, replace(config, cache_tokens=cache_tokens), settings.attention)
    runner.lead(ranks, number)
    weakref.finalize(runner, ranks.tell_later, Close(number))
    return runner


@torch.inference_mode()
def follow() -> None:
    """What every rank but the first does: carry out orders until the leader ends.

    Once they have met, Ctrl-C and SIGTERM are the leader's business: it ends the others when it has said what it has to say.
    """
    ranks = join()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    followers: dict[int, _Follower] = {}
    opened: tuple[KeyeModel, EngineConfig, str] | None = None
    while not isinstance(order := ranks.hear(), End):
        if isinstance(order, Open):
            opened = _open(ranks, order)
        elif isinstance(order, Begin):
            assert opened is not None
            model, config, attention = opened
            runner = ShardedRunner(model, replace(config, cache_tokens=order.cache_tokens), attention)
            followers[order.number], opened = _Follower(runner), None
        elif isinstance(order, Close):
            followers.pop(order.number, None)
        elif isinstance(order, Walk):
            followers[order.number].walk(order)
        elif isinstance(order, Replay):
            followers[order.number].replay(order)
        elif isinstance(order, Logits):
            followers[order.number].logits(order)
        else:
            assert isinstance(order, Encode)
            followers[order.number].encode(order)
    ranks.close()


def _open(ranks: Ranks, order: Open) -> tuple[KeyeModel, EngineConfig, str] | None:
    """Load, and tell the leader how it went."""
    settings = order.settings
    if settings.device.type == "cuda":
        settings = replace(settings, device=torch.device("cuda", local_rank()))
    try:
        model, config = settings.load(ranks.shard)
    except InputError as error:
        ranks.tell(Opened(f"rank {ranks.shard.rank}: {error}", None))
        return None
    ranks.tell(Opened(None, config.cache_tokens))
    return model, config, settings.attention
