"""Paged caches: keys, values and index keys of all layers, addressed by one slot number; and who owns which page.

Letters: L layers, N slots of the whole cache, G KV heads, D head width, I indexer width.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.model.config import KeyeConfig

E4M3 = torch.float8_e4m3fn
CPU_CACHE_TOKENS = 65536


class PagedCaches:
    """A token's slot is page * page_size + offset, the same in all tensors of all layers."""

    def __init__(
        self,
        model: KeyeConfig,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        has_index: bool = True,
    ) -> None:
        """has_index: False where attention is dense and nothing scores."""
        assert config.cache_tokens is not None, "see `with_cache_tokens`"
        layers, self.num_slots = model.num_hidden_layers, config.cache_tokens
        self.page_size = config.page_size
        formats = CacheFormats.choose(config, device, dtype)
        shape = (layers, self.num_slots, model.num_key_value_heads)
        self.keys, self.key_scales = _cache((*shape, model.head_dim), formats.kv, device)
        self.values, self.value_scales = _cache((*shape, model.head_dim), formats.kv, device)
        self.index_keys: Tensor | None = None
        self.index_scales: Tensor | None = None
        if has_index:
            shape = (layers, self.num_slots, model.indexer.head_dim)
            self.index_keys, self.index_scales = _cache(shape, formats.index, device)

    def layer(self, number: int) -> LayerCaches:
        """One layer's part."""
        return LayerCaches(
            self.keys[number],
            self.values[number],
            _part(self.index_keys, number),
            _part(self.key_scales, number),
            _part(self.value_scales, number),
            _part(self.index_scales, number),
            self.page_size,
        )


@dataclass(frozen=True)
class CacheFormats:
    """Dtypes of what the pages hold; float8_e4m3fn comes with scales."""

    kv: torch.dtype
    index: torch.dtype

    @classmethod
    def choose(cls, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> "CacheFormats":
        """What the settings mean on this device: "auto" index keys are e4m3, as published, for half precision on a GPU."""
        is_e4m3 = config.index_cache == "e4m3" or (
            config.index_cache == "auto" and device.type == "cuda" and dtype.itemsize == 2
        )
        return cls(E4M3 if config.kv_cache == "e4m3" else dtype, E4M3 if is_e4m3 else dtype)

    def bytes_per_token(self, model: KeyeConfig, has_index: bool = True) -> int:
        """Of all layers; a scale takes four bytes."""
        kv = 2 * model.num_key_value_heads * (model.head_dim * self.kv.itemsize + 4 * (self.kv == E4M3))
        index = model.indexer.head_dim * self.index.itemsize + 4 * (self.index == E4M3)
        return model.num_hidden_layers * (kv + index * has_index)


def with_cache_tokens(
    config: EngineConfig, model: KeyeConfig, device: torch.device, dtype: torch.dtype, attention: str
) -> EngineConfig:
    """The settings with a number of cache tokens: what was asked for, or what fits beside the weights, which are loaded.

    Raises:
        InputError: not even one page fits the GPU.
    """
    if config.cache_tokens is not None:
        return config
    if device.type != "cuda":
        return replace(config, cache_tokens=CPU_CACHE_TOKENS // config.page_size * config.page_size)
    per_token = CacheFormats.choose(config, device, dtype).bytes_per_token(model, has_index=attention == "sparse")
    free, total = torch.cuda.mem_get_info(device)
    # More than every request can fill is of no use.
    wanted = min(config.max_batch_requests * model.max_position_embeddings, max(0, free - config.work_bytes) // per_token)
    if wanted < config.page_size:
        raise InputError(
            f"the weights leave {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB, and {config.work_bytes / 2**30:.1f} "
            f"are kept for work: no cache page fits; take a larger GPU or experts in e4m3"
        )
    return replace(config, cache_tokens=wanted // config.page_size * config.page_size)


def _part(tensor: Tensor | None, number: int) -> Tensor | None:
    return None if tensor is None else tensor[number]


def _cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Numbers, and scales of all dimensions but the last where they are e4m3."""
    scales = torch.empty(shape[:-1], device=device, dtype=torch.float32) if dtype == E4M3 else None
    return torch.empty(shape, device=device, dtype=dtype), scales


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
