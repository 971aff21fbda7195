"""Paged caches: keys, values and index keys of all layers, addressed by one slot number; and who owns which page.

Letters: N slots of the whole cache, G KV heads, D head width, I indexer width.
"""

from collections import deque

import torch
from torch import Tensor

from openkeye.engine.config import EngineConfig
from openkeye.model.config import KeyeConfig


class PagedCaches:
    """Three tensors a layer. A token's slot is page * page_size + offset, the same in all of them."""

    def __init__(self, model: KeyeConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        layers, slots = model.num_hidden_layers, config.cache_tokens
        self.page_size = config.page_size
        shape = (layers, slots, model.num_key_value_heads, model.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.index_keys = torch.empty(layers, slots, model.indexer.head_dim, device=device, dtype=dtype)

    def write(self, layer: int, slots_T: Tensor, key_TGD: Tensor, value_TGD: Tensor, index_key_TI: Tensor | None) -> None:
        """Store new tokens in their slots."""
        self.keys[layer].index_copy_(0, slots_T, key_TGD)
        self.values[layer].index_copy_(0, slots_T, value_TGD)
        if index_key_TI is not None:
            self.index_keys[layer].index_copy_(0, slots_T, index_key_TI)


class PagePool:
    """Counts the users of every page. A page without users is free.

    The prefix cache is one user of each page that it keeps; a page with no other user is idle: its content waits for the next
    prompt that begins alike, and it is given up when room is needed.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_idle = 0
        self._free = deque(range(num_pages))
        self._num_users = [0] * num_pages
        self._is_kept = [False] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that a request can get: free ones, and idle ones that the prefix cache gives up."""
        return self.num_free + self.num_idle

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one user."""
        assert count <= self.num_free
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._num_users[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more user of a page."""
        assert self._num_users[page] > 0
        self.num_idle -= self.is_idle(page)
        self._num_users[page] += 1

    def drop(self, page: int) -> None:
        """One user fewer; the page is free when none is left."""
        assert self._num_users[page] > 0
        self._num_users[page] -= 1
        self.num_idle += self.is_idle(page)
        if self._num_users[page] == 0:
            self._free.append(page)

    def keep(self, page: int) -> None:
        """The prefix cache becomes a user of a page that a request uses."""
        self.share(page)
        self._is_kept[page] = True

    def forget(self, page: int) -> None:
        """The prefix cache gives up a page."""
        self.num_idle -= self.is_idle(page)
        self._is_kept[page] = False
        self.drop(page)

    def is_idle(self, page: int) -> bool:
        """Whether the prefix cache alone uses the page."""
        return self._is_kept[page] and self._num_users[page] == 1
