"""Small packs for the tests of pasts: layouts, projections of their tokens, and what each token sees by the plain rule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.data.packed_batch import DocumentSpan, PackedLayout
from openkeye.model.past import IndexerOutput

Shape = tuple[int, tuple[int, ...]]
# tokens of a document's trunk, and of each of its branches


def make_layout(*documents: Shape) -> PackedLayout:
    spans, start = [], 0
    for trunk, branches in documents:
        begins, place = [], start + trunk
        for length in branches:
            begins.append(place)
            place += length
        spans.append(DocumentSpan(start, start + trunk, tuple(begins), place))
        start = place
    return PackedLayout(tuple(spans))


def visible_keys(layout: PackedLayout) -> list[list[int]]:
    """Of each token, in order: the rule itself, token by token."""
    result = []
    for span in layout.spans:
        ends = (*span.branches[1:], span.end)
        result += [list(range(span.start, token + 1)) for token in range(span.start, span.trunk_end)]
        trunk = list(range(span.start, span.trunk_end))
        for start, end in zip(span.branches, ends, strict=False):
            result += [trunk + list(range(start, token + 1)) for token in range(start, end)]
    return result


@dataclass
class Projections:
    """What a layer hands to its past, as leaves with gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    gates: Tensor
    index_key: Tensor

    @property
    def trunk(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def indexer(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.index_query, self.gates, self.index_key

    @property
    def index(self) -> IndexerOutput:
        return IndexerOutput(*self.indexer)

    def take(self, tokens: Tensor | slice) -> "Projections":
        """Of these tokens, as new leaves."""
        return Projections(*(x.detach()[tokens].clone().requires_grad_() for x in vars(self).values()))

    def moved(self, device: str, dtype: torch.dtype) -> "Projections":
        """The same numbers elsewhere, as new leaves; gates stay float32 beside half precision."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dtypes = [wide if name == "gates" else dtype for name in vars(self)]
        parts = zip(vars(self).values(), dtypes, strict=True)
        return Projections(*(x.detach().to(device, dtype).requires_grad_() for x, dtype in parts))


def draw(
    num_tokens: int, heads: int = 6, groups: int = 2, width: int = 8, index_heads: int = 4, index_width: int = 8, seed: int = 0
) -> Projections:
    """Random float64 projections whose index scores have many exact zeros, and so ties, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (num_tokens, heads, width),
        (num_tokens, groups, width),
        (num_tokens, groups, width),
        (num_tokens, index_heads, index_width),
        (num_tokens, index_heads),
        (num_tokens, index_width),
    )
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0] *= 2
    drawn[4] = drawn[4].relu() * index_width**-0.5
    return Projections(*(x.requires_grad_() for x in drawn))
