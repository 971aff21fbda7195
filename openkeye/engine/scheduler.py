"""Which tokens run next: one of every answer under way, and chunks of prompts beside them, first come first served.

A prompt whose video is still being decoded runs as far as its frames have come, and others run meanwhile.
"""

import threading
from collections import deque
from collections.abc import Callable

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
        self.salt = b""
        # names the weights that compute pages now; what others computed is never found under it
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        # in the order of their arrival
        self._is_prompts_turn = False
        # of the last batch, where they take turns
        self.slots: dict[int, Tensor] = {}
        # by id(request): [pages * page_size] int64 cache slots of its tokens
        self.on_news: Callable[[], None] = lambda: None
        # called when something may be due again, on the thread that decoded it
        self._news = threading.Event()
        # whether something may be due: cleared by the batch that was not

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
        self._name_pages(request)
        self.waiting.append(request)
        self._news.set()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def has_due_work(self) -> bool:
        """Whether a batch may be had now; False while all that is left waits for frames."""
        return self.has_work and self._news.is_set()

    def next_batch(self) -> Batch | None:
        """One token of every answer under way, then at most `prefill_chunk_tokens` of prompts, of the oldest first.

        So no answer waits for another's whole prompt, and the batch that ends a prompt begins the next where there is room.
        None where nothing can run before more frames are decoded.
        """
        self._news.clear()
        self._grow_answers()
        batch = self._fixed_batch() if self.config.is_batch_invariant else self._mixed_batch()
        self._start_decoders()
        if batch is None:
            assert self.running, "a request that fits the empty pages is always admitted"
            return None
        self._news.set()
        return batch

    def _mixed_batch(self) -> Batch | None:
        segments = [self._segment(request, 1) for request in self.running if request.is_answering]
        room = self.config.prefill_chunk_tokens
        unfinished = iter([request for request in self.running if not request.is_answering])
        while room and (request := next(unfinished, None) or self._admit_next()) is not None:
            count = min(room, self._num_due(request))
            if count:
                segments.append(self._segment(request, count))
                room -= count
        return Batch(segments) if segments else None

    def _fixed_batch(self) -> Batch | None:
        """A part of one prompt, or one token of every answer, in turn; padded to one shape each.

        A prompt is cut at multiples of the chunk, and tokens of an answer that were lost with its pages are computed one by
        one, as they were the first time.
        """
        prompt, count = self._next_fixed_part()
        answers = [request for request in self.running if request.is_prefilled]
        self._is_prompts_turn = prompt is not None and not (self._is_prompts_turn and answers)
        if prompt is not None and self._is_prompts_turn:
            return Batch([self._segment(prompt, count)], self.config.prefill_chunk_tokens - count, is_prompt=True)
        segments = [self._segment(request, 1) for request in answers]
        return Batch(segments, self.config.max_batch_requests - len(segments)) if segments else None

    def _next_fixed_part(self) -> tuple[Request | None, int]:
        """The oldest prompt whose next part is whole, and how many tokens that has."""
        chunk = self.config.prefill_chunk_tokens
        unfinished = iter([request for request in self.running if not request.is_prefilled])
        while (request := next(unfinished, None) or self._admit_next()) is not None:
            if request.is_prefilled:
                # Its whole prompt was found, and a part of what is given behind it.
                continue
            num_ready = self._num_due(request)
            count = min(chunk - request.num_computed % chunk, request.num_prompt - request.num_computed)
            # What fills the store before a part is whole has to run: else nothing more would come.
            if num_ready >= count or (num_ready and request.media.is_full):
                return request, min(num_ready, count)
        return None, 0

    def wait_for_batch(self) -> Batch:
        """The next batch, as soon as anything is due.

        Raises:
            What ended the decoding of a running request's video, such as InputError.
        """
        while True:
            for request in self.running:
                if request.media.error is not None:
                    raise request.media.error
            batch = self.next_batch()
            if batch is not None:
                return batch
            self._news.wait()

    def remove(self, request: Request) -> None:
        """Forget a request, running or waiting, and give its pages back; the prefix cache keeps its own."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._news.set()

    def clear(self) -> None:
        """Drop every queued and running request, so that a failed call leaves nothing behind."""
        for request in self.running:
            self._release(request)
        self.running.clear()
        self.waiting.clear()

    def begin_weights(self, salt: bytes, keeps_keys: bool, flushes: bool = False) -> None:
        """The weights are others from now on; salt names them.

        No page of before serves a request that begins later. keeps_keys: running requests go on over the keys they have, else
        these are computed again, which loses no token. flushes: pages of before are forgotten at once and not when room is
        needed.
        """
        self.salt = salt
        for request in list(reversed(self.running)):
            if not keeps_keys:
                self._preempt(request)
            elif request.num_computed:
                request.has_stale_keys, request.page_keys = True, []
                if request.record is not None:
                    request.record.has_mixed_keys = True
        for request in [*self.waiting, *self.running]:
            request.page_keys = []
            self._name_pages(request)
        if flushes:
            self.prefix_cache.clear()
        self._news.set()

    def keep_full_pages(self, request: Request, first_token: int = 0) -> None:
        """Offer the computed full pages of a prompt to later prompts, and let go of the pictures behind them.

        first_token: pages before it were offered already.
        """
        num_full = min(request.num_computed, request.num_nameable) // self.config.page_size
        if not request.has_stale_keys:
            if num_full > len(request.page_keys):
                self._name_pages(request)
            for number in range(first_token // self.config.page_size, num_full):
                self.prefix_cache.keep(request.page_keys[number], request.pages[number])
        request.media.release(request.first_picture_from(request.num_computed))

    def _admit_next(self) -> Request | None:
        """The next in the queue, where there are pages for all that is known of it and one more."""
        request = self._next_to_admit()
        if request is None or len(self.running) >= self.config.max_batch_requests:
            return None
        pages = self.prefix_cache.match(request.page_keys[: self._num_usable(request)])
        wanted = min(self._num_pages(request.num_known) + 1, self._num_pages(request.num_tokens_at_most)) - len(pages)
        if wanted > self._num_unpromised():
            for page in pages:
                self.pool.drop(page)
            return None
        request.num_computed = len(pages) * self.config.page_size
        if not request.num_preemptions:
            request.num_cached = request.num_computed
        request.num_promised_pages = wanted
        self._give(request, pages)
        request.media.rewind(request.first_picture_from(request.num_computed))
        if request.media.is_complete:
            self._take_promised(request, wanted)
        self.waiting.remove(request)
        self.running.append(request)
        return request

    def _next_to_admit(self) -> Request | None:
        """The first in the queue that does not wait for its next page, which is just being computed for another."""
        if not any(request.waits_for_prefix for request in self.waiting):
            return self.waiting[0] if self.waiting else None
        page_size = self.config.page_size
        pending = {
            key
            for running in self.running
            if not running.is_prefilled and not running.has_stale_keys
            for key in running.page_keys[running.num_computed // page_size :]
        }
        for request in self.waiting:
            is_patient = pending and request.waits_for_prefix
            usable = request.page_keys[: self._num_usable(request)] if is_patient else []
            number = self.prefix_cache.num_known(usable)
            if number == len(usable) or usable[number] not in pending:
                return request
        return None

    def _start_decoders(self) -> None:
        """Begin to decode for running requests, the oldest first, a few at a time.

        Only those that run: what they decode is also read, so that none waits for a decoder that waits for it.
        """
        num_free = self.config.num_decoders - sum(request.media.is_decoding for request in self.running)
        startable = [request for request in self.running if request.media.is_startable]
        for request in startable[: max(num_free, 0)]:
            request.media.start(self.config.decode_ahead_bytes, self._ring)

    def _num_due(self, request: Request) -> int:
        """How many of its tokens a running request computes next, as far as there is room.

        While its frames are still coming it waits until they make a whole chunk, or for as many as may wait.
        """
        # Asked first: what fills the store is among what has arrived then.
        is_full = request.media.is_full
        request.take_arrived()
        if not request.is_prefilled:
            self._name_pages(request)
            self._reuse_pages(request)
        is_full &= request.media.release(request.first_picture_from(request.num_computed))
        num_ready = max(request.num_ready - request.num_computed, 0)
        is_enough = is_full or num_ready >= min(self.config.prefill_chunk_tokens, request.num_missing)
        return num_ready if is_enough else 0

    def _name_pages(self, request: Request) -> None:
        """Give keys to the full pages whose content is known by now."""
        if not request.has_stale_keys:
            content = request.nameable_content()
            request.page_keys = page_keys(content, self.config.page_size, request.page_keys, self.salt)

    def _reuse_pages(self, request: Request) -> None:
        """What another request has computed takes the place of the next pages, whose content was not known when it began."""
        page_size = self.config.page_size
        while request.num_computed == len(request.pages) * page_size < self._num_usable(request) * page_size:
            number = request.num_computed // page_size
            pages = self.prefix_cache.match(request.page_keys[number : number + 1])
            if not pages:
                return
            self._give(request, pages)
            request.num_promised_pages -= 1
            request.num_computed += page_size
            if not request.num_preemptions:
                request.num_cached += page_size

    def _num_usable(self, request: Request) -> int:
        """Pages that may come from the prefix cache: the last known token is always computed, its logits choose the next."""
        return ((request.num_known if request.keeps_answer else request.num_prompt) - 1) // self.config.page_size

    def _grow_answers(self) -> None:
        """A page for the next token of every answer that has filled its own; where none is left the youngest steps back."""
        for request in list(self.running):
            # The oldest come first, and they take from the youngest: those may be gone when their turn comes.
            while request in self.running and request.num_known > self._num_owned(request) * self.config.page_size:
                if self._num_unpromised():
                    request.num_promised_pages += 1
                else:
                    self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it waits at the head of the queue and computes its known tokens again, losing none."""
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.has_stale_keys = False
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _num_owned(self, request: Request) -> int:
        return len(request.pages) + request.num_promised_pages

    def _num_unpromised(self) -> int:
        """Pages that a request can get: those that no running one is to have."""
        return self.pool.num_available - sum(request.num_promised_pages for request in self.running)

    def _take_promised(self, request: Request, count: int) -> None:
        """Free pages, idle ones of the prefix cache where it must be."""
        self.prefix_cache.make_room(count)
        self._give(request, self.pool.take(count))
        request.num_promised_pages -= count

    def _give(self, request: Request, pages: list[int]) -> None:
        """More pages for a request."""
        request.pages += pages
        page_starts = torch.tensor(pages, dtype=torch.int64, device=self.device) * self.config.page_size
        slots = (page_starts[:, None] + torch.arange(self.config.page_size, device=self.device)).flatten()
        known = self.slots.get(id(request))
        self.slots[id(request)] = slots if known is None else torch.cat([known, slots])

    def _release(self, request: Request) -> None:
        """End what a running request has: its pages and its decoding."""
        request.media.close()
        for page in request.pages:
            self.pool.drop(page)
        request.pages, request.num_promised_pages = [], 0
        del self.slots[id(request)]

    def _ring(self) -> None:
        """Something may be due. On a decoding thread."""
        self._news.set()
        self.on_news()

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _segment(self, request: Request, count: int) -> Segment:
        start = request.num_computed
        num_pages = self._num_pages(start + count) - len(request.pages)
        if num_pages > 0:
            self._take_promised(request, num_pages)
        return Segment(request, start, count, self.slots[id(request)][: start + count])
