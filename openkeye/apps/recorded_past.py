"""A past that compares its selection with a recorded one, layer by layer.

Letters: T tokens, H query heads, G KV heads, D head width, K picked tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.kernels.dispatch import index_scores, indexer_select, sparse_attention
from openkeye.model.past import IndexerOutput

# Of the largest score of a row: what fp32 leaves open after a few layers.
FP32_ROUNDING = 1e-5


@dataclass
class RecordedPast:
    """One sequence in one call, like `PlainPast`; counts the entries where its selection differs from the recorded masks.

    A recording in fp32 cannot decide between positions whose scores are equal within its rounding. Rows that differ in such
    positions alone count as undecided, and attention takes the recorded choice, so that later layers stay comparable.
    """

    top_k: int
    recorded: Tensor
    # [layers, T, T] uint8
    num_wrong: int = 0
    num_undecided: int = 0

    @property
    def needs_index(self) -> bool:
        return True

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """See `Past.attend`."""
        assert index is not None
        num_tokens = query_THD.shape[0]
        indices_TK = indexer_select(index.query_TJI, index.gates_TJ, index.key_TI, self.top_k, torch.arange(num_tokens))
        # One column more takes the pads.
        ours = torch.zeros(num_tokens, num_tokens + 1, dtype=torch.bool)
        ours.scatter_(1, torch.where(indices_TK < 0, num_tokens, indices_TK).long(), True)
        differs = ours[:, :-1] != (self.recorded[layer_index] != 0)
        for row in differs.any(dim=1).nonzero().flatten().tolist():
            num_differing = int(differs[row].sum())
            if self._is_undecided(index, row, indices_TK[row], differs[row]):
                self.num_undecided += num_differing
                choice = self.recorded[layer_index, row].nonzero().flatten()
                indices_TK[row] = torch.nn.functional.pad(choice, (0, self.top_k - choice.shape[0]), value=-1).int()
            else:
                self.num_wrong += num_differing
        return sparse_attention(query_THD, key_TGD, value_TGD, indices_TK, query_THD.shape[-1] ** -0.5)

    def _is_undecided(self, index: IndexerOutput, row: int, picked_K: Tensor, differs_S: Tensor) -> bool:
        """Whether all positions that one row has otherwise than recorded score like the last one that was picked."""
        positions = differs_S.nonzero().flatten()
        is_picked = torch.isin(positions, picked_K)
        if int(positions[-1]) > row or 2 * int(is_picked.sum()) != positions.shape[0]:
            return False
        scores = index_scores(index.query_TJI[row, None], index.gates_TJ[row, None], index.key_TI[: row + 1])[0]
        boundary = scores[picked_K[picked_K >= 0].long()].min()
        return bool((scores[positions] - boundary).abs().max() <= FP32_ROUNDING * scores.abs().max())
