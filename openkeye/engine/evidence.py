"""What an answer rests on: which tokens of its prompt attention picked while it was written, and how much weight they got.

A token of the answer is chosen by the query of the token before it: these queries are counted, in every layer, and no others.

Letters: P prompt tokens, S tokens that a query sees, K picked tokens, N slots of the cache, H query heads, G KV heads, D head
width.
"""

import torch
from torch import Tensor

from openkeye.model.sharding import ALONE, Shard

SLAB_KEYS = 8192
# keys whose products stand in memory at once, in float32


class EvidenceCounts:
    """What the batches of one request count, on their device, for every token of its prompt.

    A request that was preempted goes on counting: what is computed again chose no token.
    """

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.num_picks = 0
        # queries counted: layers times tokens of the answer, its end included
        self.num_selective = 0
        # of these, queries that did not see all that is before them
        self._counts: Tensor | None = None
        self._weights: Tensor | None = None
        # [P + 1] int32 and float32; the last place takes what is not of the prompt

    def add(
        self,
        query_HD: Tensor,
        key_NGD: Tensor,
        slots_S: Tensor,
        picked_K: Tensor | None,
        key_scales_NG: Tensor | None = None,
        shard: Shard = ALONE,
    ) -> None:
        """Count one query of one layer.

        Args:
            query_HD: normalised and rotated.
            key_NGD: the layer's cache.
            slots_S: slot in it of every token that the query might see.
            picked_K: positions in the sequence that it attends to, -1 for none; None where it sees all.
            key_scales_NG: of a cache in float8_e4m3fn.
            shard: of which query and cache have the heads; all its ranks count alike.
        """
        if self._counts is None:
            self._counts = torch.zeros(self.num_prompt + 1, dtype=torch.int32, device=query_HD.device)
            self._weights = torch.zeros(self.num_prompt + 1, device=query_HD.device)
        assert self._weights is not None
        self.num_picks += 1
        self.num_selective += picked_K is not None and picked_K.shape[0] < slots_S.shape[0]
        if picked_K is None:
            picked_K = torch.arange(slots_S.shape[0], device=slots_S.device)
        places = torch.where((picked_K < 0) | (picked_K >= self.num_prompt), self.num_prompt, picked_K).long()
        self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        slots_K = slots_S[picked_K.clamp_min(0).long()]
        weights_K = attention_weights(query_HD, key_NGD, slots_K, picked_K >= 0, key_scales_NG)
        self._weights.index_add_(0, places, shard.add(weights_K) / shard.size)

    def counts_P(self) -> Tensor:
        """[P] int64 on the CPU: how often each token of the prompt was picked."""
        return torch.zeros(self.num_prompt, dtype=torch.int64) if self._counts is None else self._counts[:-1].long().cpu()

    def weights_P(self) -> Tensor:
        """[P] float32 on the CPU: part of all attention that fell on each token of the prompt; the rest fell on the answer."""
        return torch.zeros(self.num_prompt) if self._weights is None else self._weights[:-1].cpu() / self.num_picks


def attention_weights(
    query_HD: Tensor, key_NGD: Tensor, slots_K: Tensor, is_picked_K: Tensor, key_scales_NG: Tensor | None = None
) -> Tensor:
    """[K] float32, the mean over heads of softmax(q k / sqrt(D)) over the picked keys in these slots."""
    query_GHD = query_HD.float().unflatten(0, (key_NGD.shape[1], -1)) * query_HD.shape[-1] ** -0.5
    slabs = [
        torch.einsum("ghd,kgd->ghk", query_GHD, _read_keys(key_NGD, slots, key_scales_NG)) for slots in slots_K.split(SLAB_KEYS)
    ]
    # What nobody wrote may be anything.
    logits = torch.cat(slabs, dim=-1).masked_fill(~is_picked_K, -torch.inf)
    return logits.softmax(-1).mean((0, 1))


def _read_keys(key_NGD: Tensor, slots_K: Tensor, scales_NG: Tensor | None) -> Tensor:
    """[K, G, D] float32."""
    if scales_NG is None:
        return key_NGD.index_select(0, slots_K).float()
    # Bytes, because not every device gathers e4m3 by index.
    codes = key_NGD.view(torch.uint8).index_select(0, slots_K).view(torch.float8_e4m3fn)
    return codes.float() * scales_NG.index_select(0, slots_K)[:, :, None]
