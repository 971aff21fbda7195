"""One engine over several ranks: the leader's runner turns each model call into an order, `follow` carries the orders out.

Rank 0 schedules, embeds and samples; it sends the others where new tokens stand (segments and pages), their positions and their
embeddings, and all walk the decoder, each over its own heads and experts. Pictures are shared out among the ranks.

Letters: T new tokens, N rows, V vocabulary.
"""

import signal
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.launch import local_rank, num_ranks, rank
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.ranks import End, Ranks, join
from openkeye.engine.runner import Runner
from openkeye.engine.sharded_past import ShardedPast
from openkeye.inputs.patches import Patches
from openkeye.model.sharding import Shard
from openkeye.model.weights import load_model


@dataclass(frozen=True)
class ModelSettings:
    """Everything that a runner is made from."""

    model_dir: str
    device: torch.device
    dtype: torch.dtype
    attention: str
    config: EngineConfig

    def load(self, shard: Shard) -> Runner:
        """A runner of one rank's part.

        Raises:
            InputError: no checkpoint that so many ranks can share.
        """
        model = load_model(self.model_dir, self.device, self.dtype, shard=shard)
        kind = Runner if shard.size == 1 else LeadingRunner if shard.rank == 0 else ShardedRunner
        return kind(model, self.config, self.attention)


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


@dataclass(frozen=True)
class Close:
    """Let a model go."""

    number: int


@dataclass(frozen=True)
class SegmentOrder:
    """A `Segment`: of its pages only those that the follower does not know."""

    key: int
    # of the request
    start: int
    count: int
    num_known_pages: int
    new_pages: list[int]


@dataclass(frozen=True)
class Walk:
    """Run the decoder; the embeddings of all tokens follow as a tensor."""

    number: int
    segments: list[SegmentOrder]
    position_ids: np.ndarray
    # [3, T] int64


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
        past = ShardedPast(batch, self.caches, self.attention, top_k, self.config.dense_up_to)
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
        order = Walk(self.number, self._segments(batch), position_ids_3T.numpy())
        with self.ranks.in_step():
            self.ranks.tell(order)
            dist.broadcast(embeds_TD, src=0)
            return super().walk(batch, embeds_TD, position_ids_3T)

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
        told, self._pages_told, orders = self._pages_told, {}, []
        for segment in batch.segments:
            key, pages = id(segment.request), segment.request.pages
            known, num_known = told.get(key, (pages, 0))
            # After a preemption, and where another request has the key now, the list is another.
            num_known = num_known if known is pages else 0
            orders.append(SegmentOrder(key, segment.start, segment.count, num_known, pages[num_known:]))
            self._pages_told[key] = (pages, len(pages))
        return orders


class _Follower:
    """A follower's runner, and what it knows of the requests."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.slots: dict[int, Tensor] = {}
        # by the request's key: the cache slots of its pages
        self.hidden_TD = torch.empty(0)

    def walk(self, order: Walk) -> None:
        """Carry out the order."""
        runner = self.runner
        num_tokens, width = order.position_ids.shape[1], runner.model.config.hidden_size
        batch = Batch([self._segment(segment) for segment in order.segments])
        self.slots = {segment.key: self.slots[segment.key] for segment in order.segments}
        embeds = torch.empty(num_tokens, width, device=runner.device, dtype=runner.dtype)
        dist.broadcast(embeds, src=0)
        self.hidden_TD = runner.walk(batch, embeds, torch.from_numpy(order.position_ids))

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

    def _segment(self, order: SegmentOrder) -> Segment:
        if order.new_pages:
            size, device = self.runner.caches.page_size, self.runner.device
            starts = torch.tensor(order.new_pages, dtype=torch.int64, device=device) * size
            slots = (starts[:, None] + torch.arange(size, device=device)).flatten()
            self.slots[order.key] = torch.cat([self.slots[order.key], slots]) if order.num_known_pages else slots
        slots = self.slots[order.key]
        # Only the leader's runner reads requests.
        return Segment(None, order.start, order.count, slots[: order.start + order.count])  # type: ignore[arg-type]


_numbers = iter(range(1 << 62))


def open_runner(settings: ModelSettings) -> Runner:
    """A runner of a whole model: alone, or as the leader of the ranks that torchrun started.

    Raises:
        InputError: the checkpoint cannot be used or shared, GPUs are missing, or this process is a follower.
    """
    if num_ranks() == 1:
        return settings.load(Shard())
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
        runner = settings.load(ranks.shard)
    except InputError as error:
        errors.append(str(error))
    answers = [ranks.hear() for _ in range(1, ranks.shard.size)]
    errors += [answer.error for answer in answers if answer.error is not None]
    if errors:
        ranks.tell_later(Close(number))
        raise InputError(errors[0])
    assert isinstance(runner, LeadingRunner)
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
    while not isinstance(order := ranks.hear(), End):
        if isinstance(order, Open):
            _open(ranks, order, followers)
        elif isinstance(order, Close):
            followers.pop(order.number, None)
        elif isinstance(order, Walk):
            followers[order.number].walk(order)
        elif isinstance(order, Logits):
            followers[order.number].logits(order)
        else:
            assert isinstance(order, Encode)
            followers[order.number].encode(order)
    ranks.close()


def _open(ranks: Ranks, order: Open, followers: dict[int, _Follower]) -> None:
    """Load, and tell the leader how it went."""
    device = order.settings.device
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
    try:
        runner = replace(order.settings, device=device).load(ranks.shard)
    except InputError as error:
        ranks.tell(Opened(f"rank {ranks.shard.rank}: {error}"))
    else:
        followers[order.number] = _Follower(runner)
        ranks.tell(Opened(None))
