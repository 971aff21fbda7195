"""Which tokens run next: first come first served, prompts in chunks, then all answers together."""

from collections import deque

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.pages import PagePool
from openkeye.engine.prefix_cache import PrefixCache, page_keys
from openkeye.engine.request import Request


class Scheduler:
    """Admits requests to pages, cuts prompts into chunks and gathers decode batches."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.pool = PagePool(config.cache_tokens // config.page_size)
        self.prefix_cache = PrefixCache(self.pool)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.slots: dict[int, Tensor] = {}
        # by id(request): [pages * page_size] int64 cache slots of its tokens

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it could never fit the pages, even alone.
        """
        needed = self._num_pages(request)
        if needed > self.pool.num_pages:
            raise InputError(
                f"the prompt of {request.num_prompt:,} tokens and up to {request.sampling.max_new_tokens:,} of answer need "
                f"{needed * self.config.page_size:,} cache tokens, the engine has {self.config.cache_tokens:,}: "
                "take fewer frames, a shorter part, or a larger cache"
            )
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> Batch:
        """The next prompt chunk where a prompt is unfinished or can be admitted, else one token of every answer."""
        for request in self.running:
            if not request.is_prefilled:
                return self._prefill(request)
        if self.waiting and len(self.running) < self.config.max_batch_requests and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            return self._prefill(request)
        assert self.running, "a request that fits the empty pages is always admitted"
        return Batch([self._segment(request, request.num_computed, 1) for request in self.running])

    def finish(self, request: Request) -> None:
        """Give a finished request's pages back; the prefix cache keeps its own."""
        self.running.remove(request)
        self._release(request)

    def clear(self) -> None:
        """Drop every queued and running request, so that a failed call leaves nothing behind."""
        for request in self.running:
            self._release(request)
        self.running.clear()
        self.waiting.clear()

    def keep_full_pages(self, request: Request) -> None:
        """Offer the computed full pages of a prompt to later prompts."""
        for number in range(min(request.num_computed, request.num_prompt) // self.config.page_size):
            self.prefix_cache.keep(request.page_keys[number], request.pages[number])

    def _admit(self, request: Request) -> bool:
        """Find the known beginning and take pages for the rest, prompt and longest answer."""
        request.page_keys = page_keys(request.content, self.config.page_size)
        # The last prompt token is always computed: its logits begin the answer.
        usable = (request.num_prompt - 1) // self.config.page_size
        pages = self.prefix_cache.match(request.page_keys[:usable])
        missing = self._num_pages(request) - len(pages)
        if self.pool.num_free < missing:
            self.prefix_cache.make_room(missing)
        if self.pool.num_free < missing:
            for page in pages:
                self.pool.drop(page)
            return False
        request.num_cached = request.num_computed = len(pages) * self.config.page_size
        request.pages = pages + self.pool.take(missing)
        page_starts = torch.tensor(request.pages, device=self.device) * self.config.page_size
        offsets = torch.arange(self.config.page_size, device=self.device)
        self.slots[id(request)] = (page_starts[:, None] + offsets).flatten()
        return True

    def _release(self, request: Request) -> None:
        for page in request.pages:
            self.pool.drop(page)
        request.pages = []
        del self.slots[id(request)]

    def _num_pages(self, request: Request) -> int:
        return -(-request.num_tokens_at_most // self.config.page_size)

    def _prefill(self, request: Request) -> Batch:
        count = min(self.config.prefill_chunk_tokens, request.num_prompt - request.num_computed)
        return Batch([self._segment(request, request.num_computed, count)])

    def _segment(self, request: Request, start: int, count: int) -> Segment:
        return Segment(request, start, count, self.slots[id(request)][: start + count])
