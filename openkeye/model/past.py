"""What attention asks of the past: a `Past` is handed new keys, a `CachedPast` says where they are to be written.

The trainer's packed batch and `check` are of the first kind, the engine's pages of the second.

Letters: T new tokens, S slots, H query heads, G KV heads, D head width, J indexer heads, I indexer width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from openkeye.kernels.dispatch import dense_attention, indexer_select, sparse_attention
from openkeye.kernels.layer_caches import LayerCaches


@dataclass(frozen=True)
class IndexerOutput:
    """The lightning indexer's view of the new tokens, after norms, rotary and Hadamard (report, DSA: I[t, s])."""

    query_TJI: Tensor
    gates_TJ: Tensor
    # float32, already multiplied by I ** -0.5
    key_TI: Tensor


@dataclass(frozen=True)
class CachedIndex:
    """The same with the keys in a cache already; where that is e4m3 the queries are too, and their scales in the gates."""

    query_TJI: Tensor
    gates_TJ: Tensor


class Past(Protocol):
    """Keys and values of earlier tokens, and the attention over them."""

    @property
    def needs_index(self) -> bool:
        """False where attention is dense and nothing scores: the decoder then skips the indexer and passes None."""
        ...

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """Append the new keys, select for each query, attend.

        Args:
            layer_index: 0-based decoder layer.
            query_THD: [T, H, D] normalised and rotated.
            key_TGD: [T, G, D] normalised and rotated.
            value_TGD: [T, G, D].
            index: the indexer's projections of the same tokens, or None where `needs_index` is False.

        Returns:
            [T, H, D]: softmax(q k / sqrt(D)) v over the selected, causal positions of each query's own sequence.
        """
        ...


class CachedPast(ABC):
    """Earlier tokens in caches, whose slots new keys and values are written to by the operation that makes them."""

    @property
    @abstractmethod
    def needs_index(self) -> bool:
        """See `Past.needs_index`."""

    @property
    @abstractmethod
    def new_slots_T(self) -> Tensor:
        """[T] int64: the slot of every new token, the same in all layers; negative: written nowhere."""

    @abstractmethod
    def caches(self, layer_index: int) -> LayerCaches:
        """A layer's caches."""

    @abstractmethod
    def attend(self, layer_index: int, query_THD: Tensor, index: CachedIndex | None) -> Tensor:
        """`Past.attend` once the new tokens' keys and values stand in their slots."""


@dataclass
class PlainPast:
    """One sequence in one call, nothing before it: what `openkeye check` and tests run on."""

    top_k: int
    attention: str = "sparse"
    # "sparse" or "dense"
    selected: dict[int, Tensor] = field(default_factory=dict)
    # layer -> [T, top_k] int32 positions, filled where attention is sparse

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse"

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """See `Past.attend`."""
        positions = torch.arange(query_THD.shape[0], device=query_THD.device)
        scale = query_THD.shape[-1] ** -0.5
        if index is None:
            return dense_attention(query_THD, key_TGD, value_TGD, positions, scale)
        indices = indexer_select(index.query_TJI, index.gates_TJ, index.key_TI, self.top_k, positions)
        self.selected[layer_index] = indices
        return sparse_attention(query_THD, key_TGD, value_TGD, indices, scale)
