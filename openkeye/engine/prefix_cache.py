"""Full pages kept for the next prompt that begins alike; equal media match by their pixels, not by their pads."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from openkeye.engine.pages import PagePool


def page_keys(content_T: np.ndarray, page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for every full page of a prompt: it names the page's content and everything before it.

    Args:
        content_T: [T] int64, the token id of text and a number made of the pixels for media (`Request.content`).
        known: the keys of its first pages, where they are known already.
    """
    keys = list(known)
    previous = keys[-1] if keys else b""
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
