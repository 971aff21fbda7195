"""New tokens' projections into pages by hand, as a layer writes them before its past attends."""

import torch
from torch import Tensor

from openkeye.engine.pages import PagedCaches
from openkeye.kernels.reference import quantize_vectors


def write_tokens(
    caches: PagedCaches, layer: int, slots_T: Tensor, key_TGD: Tensor, value_TGD: Tensor, index_key_TI: Tensor
) -> None:
    """Keys, values and index keys to their slots, quantised where the caches are."""
    own = caches.layer(layer)
    targets = ((own.key_SGD, own.key_scales_SG), (own.value_SGD, own.value_scales_SG), (own.index_key_SI, own.index_scales_S))
    for x, (cache, scales) in zip((key_TGD, value_TGD, index_key_TI), targets, strict=True):
        if scales is None:
            cache[slots_T] = x
        else:
            codes, scales[slots_T] = quantize_vectors(x)
            # Bytes, because not every device copies e4m3 by index.
            cache.view(torch.uint8)[slots_T] = codes.view(torch.uint8)
