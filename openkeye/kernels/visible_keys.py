"""`VisibleKeys`: which keys of a pack each of its tokens sees, for the operations that work on packs with branches.

A document is a trunk and branches behind it. A token of the trunk sees the trunk up to itself; one of a branch sees the whole
trunk and its own branch up to itself: the keys from its document's first to its own, without a gap of other branches.

Letters: T tokens of the pack, N segments (trunks and branches), D documents that have branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from openkeye.common.device import upload


class Span(Protocol):
    """Where a document stands in a pack: the trunk is start..trunk_end-1, branches follow it up to `end`."""

    @property
    def start(self) -> int: ...
    @property
    def trunk_end(self) -> int: ...
    @property
    def branches(self) -> tuple[int, ...]: ...
    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Offsets:
    """Queries and keys of several sequences, one after the other, as attention over ragged batches takes them."""

    queries_N: Tensor
    # int32 [N + 1]
    keys_N: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class BranchedRows:
    """The tokens of branches beside the trunks that they see, of the documents that have branches."""

    rows: Tensor
    # int64: the branches' tokens in the pack
    trunk_rows: Tensor
    # int64: their trunks' tokens
    offsets: Offsets
    # of the branches' tokens and the trunks' keys, document after document


@dataclass(frozen=True)
class VisibleKeys:
    """What each token sees: keys first..last without gap_start..gap_end-1. Tensors are int32 on one device."""

    spans: tuple[Span, ...]
    # the same on the host
    first_T: Tensor
    last_T: Tensor
    # each token's own place
    gap_start_T: Tensor | None
    gap_end_T: Tensor | None
    # None where no document has branches; equal where a token sees all from first to last
    segments: Offsets
    # every trunk and every branch with itself
    branched: BranchedRows | None
    # None where no document has branches

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "VisibleKeys":
        """Of documents that follow one another from 0 on; everything is made on the host and uploaded once."""
        total = spans[-1].end
        first, gap_start, gap_end = (torch.zeros(total, dtype=torch.int32) for _ in range(3))
        for span in spans:
            first[span.start : span.end] = span.start
            for start, end in branches_of(span):
                gap_start[start:end], gap_end[start:end] = span.trunk_end, start
        has_branches = any(span.branches for span in spans)
        begins = [start for span in spans for start in (span.start, *span.branches)]
        segments = torch.tensor([*begins, total], dtype=torch.int32)
        longest = int(segments.diff().max())
        on_device = upload(segments, device)
        return cls(
            spans=tuple(spans),
            first_T=upload(first, device),
            last_T=upload(torch.arange(total, dtype=torch.int32), device),
            gap_start_T=upload(gap_start, device) if has_branches else None,
            gap_end_T=upload(gap_end, device) if has_branches else None,
            segments=Offsets(on_device, on_device, longest, longest),
            branched=_branched_rows([span for span in spans if span.branches], device) if has_branches else None,
        )

    @cached_property
    def max_seen(self) -> int:
        """Keys that the token with the longest view sees."""
        return max(
            span.trunk_end - span.start + max((end - start for start, end in branches_of(span)), default=0)
            for span in self.spans
        )

    def mask(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[R, C] bool: whether each of these tokens sees each of these keys."""
        is_visible = (columns >= self.first_T[rows, None]) & (columns <= self.last_T[rows, None])
        if self.gap_start_T is None or self.gap_end_T is None:
            return is_visible
        return is_visible & ((columns < self.gap_start_T[rows, None]) | (columns >= self.gap_end_T[rows, None]))

    @property
    def gaps(self) -> tuple[Tensor, Tensor] | None:
        """Starts and ends of what each token does not see."""
        return None if self.gap_start_T is None or self.gap_end_T is None else (self.gap_start_T, self.gap_end_T)


def branches_of(span: Span) -> list[tuple[int, int]]:
    """(start, end) of each branch."""
    return list(pairwise((*span.branches, span.end))) if span.branches else []


def _branched_rows(spans: list[Span], device: torch.device) -> BranchedRows:
    num_queries, num_keys = ([length(span) for span in spans] for length in (_num_branch_tokens, _num_trunk_tokens))
    queries_N, keys_N = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (num_queries, num_keys))
    rows = torch.cat([torch.arange(span.trunk_end, span.end) for span in spans])
    trunk_rows = torch.cat([torch.arange(span.start, span.trunk_end) for span in spans])
    offsets = Offsets(upload(queries_N, device), upload(keys_N, device), max(num_queries), max(num_keys))
    return BranchedRows(upload(rows, device), upload(trunk_rows, device), offsets)


def _num_branch_tokens(span: Span) -> int:
    return span.end - span.trunk_end


def _num_trunk_tokens(span: Span) -> int:
    return span.trunk_end - span.start
