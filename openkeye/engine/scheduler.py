"""Which tokens run next: one of every answer under way, and chunks of prompts beside them, first come first served."""

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
    """Admits requests to pages, mixes answers under way with chunks of prompts, and takes pages back where they run out."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        assert config.cache_tokens is not None, "see `pages.with_cache_tokens`"
        self.pool = PagePool(config.cache_tokens // config.page_size)
        self.prefix_cache = PrefixCache(self.pool)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        # in the order of their arrival
        self._is_prompts_turn = False
        # of the last batch, where they take turns
        self.slots: dict[int, Tensor] = {}
        # by id(request): [pages * page_size] int64 cache slots of its tokens

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it could never fit the pages, even alone.
        """
        needed = self._num_pages(request.num_tokens_at_most)
        if needed > self.pool.num_pages:
            raise InputError(
                f"the prompt of {request.num_prompt:,} tokens and up to {request.sampling.max_new_tokens:,} of answer need "
                f"{needed * self.config.page_size:,} cache tokens, the engine has {self.config.cache_tokens:,}: "
                "take fewer frames, a shorter part, or a larger cache"
            )
        request.page_keys = page_keys(request.content, self.config.page_size)
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> Batch:
        """One token of every answer under way, then at most `prefill_chunk_tokens` of prompts, of the oldest first.

        So no answer waits for another's whole prompt, and the batch that ends a prompt begins the next where there is room.
        """
        self._grow_answers()
        if self.config.is_batch_invariant:
            return self._fixed_batch()
        segments = [self._segment(request, 1) for request in self.running if request.is_answering]
        room = self.config.prefill_chunk_tokens
        unfinished = iter([request for request in self.running if not request.is_answering])
        while room and (request := next(unfinished, None) or self._admit_next()) is not None:
            segments.append(self._segment(request, min(room, request.num_missing)))
            room -= segments[-1].count
        assert segments, "a request that fits the empty pages is always admitted"
        return Batch(segments)

    def _fixed_batch(self) -> Batch:
        """A part of one prompt, or one token of every answer, in turn; padded to one shape each.

        A prompt is cut at multiples of the chunk, and tokens of an answer that were lost with its pages are computed one by
        one, as they were the first time.
        """
        prompt = next((request for request in self.running if not request.is_prefilled), None) or self._admit_next()
        answers = [request for request in self.running if request.is_prefilled]
        self._is_prompts_turn = prompt is not None and not (self._is_prompts_turn and answers)
        if prompt is None or not self._is_prompts_turn:
            segments = [self._segment(request, 1) for request in answers]
            return Batch(segments, self.config.max_batch_requests - len(segments))
        chunk = self.config.prefill_chunk_tokens
        count = min(chunk - prompt.num_computed % chunk, prompt.num_prompt - prompt.num_computed)
        return Batch([self._segment(prompt, count)], chunk - count, is_prompt=True)

    def remove(self, request: Request) -> None:
        """Forget a request, running or waiting, and give its pages back; the prefix cache keeps its own."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

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

    def _admit_next(self) -> Request | None:
        """The next in the queue, where there are pages for all that is known of it and one more."""
        if not self.waiting or len(self.running) >= self.config.max_batch_requests:
            return None
        request = self.waiting[0]
        # The last prompt token is always computed: its logits begin the answer.
        usable = (request.num_prompt - 1) // self.config.page_size
        pages = self.prefix_cache.match(request.page_keys[:usable])
        wanted = min(self._num_pages(request.num_known) + 1, self._num_pages(request.num_tokens_at_most))
        taken = self._take(wanted - len(pages))
        if taken is None:
            for page in pages:
                self.pool.drop(page)
            return None
        request.num_computed = len(pages) * self.config.page_size
        if not request.num_preemptions:
            request.num_cached = request.num_computed
        self._give(request, pages + taken)
        self.running.append(self.waiting.popleft())
        return request

    def _grow_answers(self) -> None:
        """A page for the next token of every answer that has filled its own; where none is left the youngest steps back."""
        for request in list(self.running):
            # The oldest come first, and they take from the youngest: those may be gone when their turn comes.
            while request in self.running and request.num_known > len(request.pages) * self.config.page_size:
                taken = self._take(1)
                if taken is None:
                    self._preempt(self.running[-1])
                else:
                    self._give(request, taken)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it waits at the head of the queue and computes its known tokens again, losing none."""
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _take(self, count: int) -> list[int] | None:
        """Free pages, idle ones of the prefix cache where it must be; None where there are not enough of both."""
        if self.pool.num_available < count:
            return None
        self.prefix_cache.make_room(count)
        return self.pool.take(count)

    def _give(self, request: Request, pages: list[int]) -> None:
        """More pages for a request."""
        request.pages += pages
        page_starts = torch.tensor(pages, device=self.device) * self.config.page_size
        slots = (page_starts[:, None] + torch.arange(self.config.page_size, device=self.device)).flatten()
        known = self.slots.get(id(request))
        self.slots[id(request)] = slots if known is None else torch.cat([known, slots])

    def _release(self, request: Request) -> None:
        for page in request.pages:
            self.pool.drop(page)
        request.pages = []
        del self.slots[id(request)]

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _segment(self, request: Request, count: int) -> Segment:
        start = request.num_computed
        return Segment(request, start, count, self.slots[id(request)][: start + count])
