"""Full pages kept for the next prompt that begins alike; equal media match by their pixels, not by their pads."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from openkeye.engine.pages import PagePool


def page_keys(content_T: np.ndarray, page_size: int, known: Sequence[bytes] = (), salt: bytes = b"") -> list[bytes]:
    """A key for every full page of a prompt: it names the page's content and everything before it.

    Args:
        content_T: [T] int64, the token id of text and a number made of the pixels for media (`Request.content`).
        known: the keys of its first pages, where they are known already.
        salt: names the weights that compute the pages; under another no page is found.
    """
    keys = list(known)
    previous = keys[-1] if keys else salt
    for start in range(len(keys) * page_size, len(content_T) - page_size + 1, page_size):
        previous = hashlib.blake2b(previous + content_T[start : start + page_size].tobytes(), digest_size=16).digest()
        keys.append(previous)
    return keys


class PrefixCache:
    """Pages by key, the longest unused dropped first. The cache itself is one user of each page it holds."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: OrderedDict[bytes, int] = OrderedDict()

    def match(self, keys: list[bytes]) -> list[int]:
        """Pages of the longest known beginning; the caller becomes one more user of each."""
        pages: list[int] = []
        for key in keys:
            if key not in self._page_of:
                break
            self._page_of.move_to_end(key)
            pages.append(self._page_of[key])
        for page in pages:
            self._pool.share(page)
        return pages

    def num_known(self, keys: Sequence[bytes]) -> int:
        """Pages of the longest known beginning."""
        return sum(1 for _ in takewhile(self._page_of.__contains__, keys))

    def keep(self, key: bytes, page: int) -> None:
        """Remember a full, computed page."""
        if key not in self._page_of:
            self._pool.keep(page)
            self._page_of[key] = page

    def make_room(self, num_pages: int) -> None:
        """Forget pages that nobody else uses until `num_pages` are free or none can be forgotten."""
        for key in list(self._page_of):
            if self._pool.num_free >= num_pages:
                return
            if self._pool.is_idle(self._page_of[key]):
                self._pool.forget(self._page_of.pop(key))

    def clear(self) -> None:
        """Forget all pages; those that requests use stay theirs until they end."""
        for page in self._page_of.values():
            self._pool.forget(page)
        self._page_of.clear()
