"""`LayerCaches`: keys, values and index keys of one layer, as the operations over pages take them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerCaches:
    """All slots of one layer's caches; scales, powers of two, where they are float8_e4m3fn.

    A page holds `page_size` neighbouring slots; which pages a request has, in order, its row of a page table says.
    """

    key_SGD: Tensor
    value_SGD: Tensor
    index_key_SI: Tensor | None
    # None where attention is dense and nothing scores
    key_scales_SG: Tensor | None = None
    value_scales_SG: Tensor | None = None
    index_scales_S: Tensor | None = None
    page_size: int = 64
