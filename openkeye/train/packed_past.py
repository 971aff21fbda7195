"""`PackedPast`: the past of a `PackedBatch`, dense or sparse, with the indexer's loss taken in the same walk.

Letters: T tokens of the pack, H query heads, G KV heads, D head width, J indexer heads, I indexer width, K picked keys, N
tokens whose picks are kept.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openkeye.data.packed_batch import PackedLayout
from openkeye.kernels import dispatch_packs as packs
from openkeye.kernels.dispatch import needs_gradients, sparse_attention
from openkeye.kernels.visible_keys import VisibleKeys
from openkeye.model.past import IndexerOutput
from openkeye.train.indexer_metrics import SampledRun, measure, sample_runs

ATTENTIONS = ("dense", "sparse")
TARGETS = ("dense", "selected", "selected_dense")


@dataclass(frozen=True)
class Teaching:
    """What the indexer learns from, and how much each token counts."""

    target: str
    # "dense": attention's distribution over all that a token sees (warm-up); "selected": the softmaxes of the heads over the
    # selection, summed; "selected_dense": the dense distribution cut to the selection (report, sparse adaptation)
    weights_T: Tensor
    # of each token in the loss: 1 / (tokens of all packs of the step), so that packing changes nothing

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"the indexer learns from one of {', '.join(TARGETS)}, got {self.target!r}")


class PackedPast:
    """Attention inside the documents of one pack, one use: a forward pass, then its backward pass.

    A token of a trunk sees its document's trunk up to itself; a token of a branch sees the whole trunk and its own branch up to
    itself. With "sparse" attention it attends to those top_k of them that the indexer scores highest, chosen as in answering.

    Args:
        layout: which tokens see which.
        top_k: keys that a token selects; one that sees no more takes them all.
        attention: "dense" or "sparse".
        teaching: what the indexer learns from; None leaves it alone.
        wants_metrics: whether `report` is to hold recall, mass and unique keys.
        emulates_e4m3: the indexer's queries and keys are rounded as answering in e4m3 rounds them; gradients pass straight
            through.

        kept_rows_N: tokens whose selected keys are kept in `kept_picks`, by layer [N, K], -1 where there are fewer.

    Raises:
        ValueError: an attention of another name, no tokens, or top_k below 1.
    """

    def __init__(
        self,
        layout: PackedLayout,
        top_k: int,
        attention: str = "dense",
        teaching: Teaching | None = None,
        wants_metrics: bool = False,
        emulates_e4m3: bool = False,
        kept_rows_N: Tensor | None = None,
    ) -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if not layout.num_tokens or top_k < 1:
            raise ValueError(f"a past needs tokens and a top_k of at least 1, got {layout.num_tokens} tokens and {top_k}")
        if teaching is not None and teaching.weights_T.shape != (layout.num_tokens,):
            raise ValueError(f"teaching needs weights [{layout.num_tokens}], got {list(teaching.weights_T.shape)}")
        self.layout, self.top_k, self.attention, self.teaching = layout, top_k, attention, teaching
        self.wants_metrics, self.emulates_e4m3 = wants_metrics, emulates_e4m3
        self.kept_rows_N = kept_rows_N
        self.kept_picks: dict[int, Tensor] = {}
        self._visible: VisibleKeys | None = None
        self._losses: dict[int, Tensor] = {}
        self._divergences: dict[int, Tensor] = {}
        self._metrics: dict[int, dict[str, Tensor]] = {}

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse" or self.teaching is not None or self.wants_metrics

    @property
    def indexer_loss(self) -> Tensor:
        """Mean over layers of the sum over tokens of weight * KL, after the forward pass; to be added to the loss.

        Its gradient goes to the indexer alone. Where attention's backward pass makes the KL (sparse, "selected", on a GPU) the
        value is 0 until then, see `report`; the gradient is right all the same, whatever the loss is multiplied by.

        Raises:
            ValueError: nothing was taught in a forward pass.
        """
        if not self._losses:
            raise ValueError("indexer_loss needs a forward pass with teaching")
        return torch.stack([self._losses[layer] for layer in sorted(self._losses)]).mean()

    @torch.no_grad()
    def report(self) -> dict[str, Tensor]:
        """Scalars on the device, after the backward pass; asking for their values waits for the device, this does not.

        `indexer_kl` is the true value of `indexer_loss`: a share of the step's, so that packs and ranks add up. With metrics
        `indexer_recall/LAYER`, `indexer_mass/LAYER`, `indexer_unique_keys/LAYER` and their averages over layers without LAYER;
        NaN where no token of the pack sees more than top_k keys.
        """
        report: dict[str, Tensor] = {}
        if self.teaching is not None and self._divergences:
            weights = self.teaching.weights_T
            sums = [(weights * divergence).sum() for divergence in self._divergences.values()]
            report["indexer_kl"] = torch.stack(sums).mean()
        by_name: dict[str, list[Tensor]] = {}
        for layer in sorted(self._metrics):
            for name, value in self._metrics[layer].items():
                report[f"{name}/{layer}"] = value
                by_name.setdefault(name, []).append(value)
        return report | {name: torch.stack(values).mean() for name, values in by_name.items()}

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """See `Past.attend`.

        Where a layer's activations are computed again (checkpointing) it is called again, and does the same again.
        """
        if self._visible is None:
            self._visible = VisibleKeys.of(self.layout.spans, query_THD.device)
        visible, scale = self._visible, query_THD.shape[-1] ** -0.5
        trunk = (query_THD, key_TGD, value_TGD)
        if index is None:
            return packs.branched_attention(*trunk, visible, scale)
        picked, index = self._select(index, visible)
        if self.kept_rows_N is not None and picked is not None:
            self.kept_picks.setdefault(layer_index, picked[self.kept_rows_N])
        if self.wants_metrics and layer_index not in self._metrics:
            self._measure(layer_index, query_THD, key_TGD, index, picked, scale)
        if self.teaching is None:
            if self.attention == "dense":
                return packs.branched_attention(*trunk, visible, scale)
            assert picked is not None
            return sparse_attention(*trunk, picked, scale)
        return self._attend_and_teach(layer_index, trunk, index, picked, scale)

    def _attend_and_teach(
        self,
        layer_index: int,
        trunk: tuple[Tensor, Tensor, Tensor],
        index: IndexerOutput,
        picked_TK: Tensor | None,
        scale: float,
    ) -> Tensor:
        assert self.teaching is not None and self._visible is not None
        query, key, _ = trunk
        target, weights, visible = self.teaching.target, self.teaching.weights_T, self._visible
        indexer = (index.query_TJI, index.gates_TJ, index.key_TI)
        lse: Tensor | None = None
        if self.attention == "dense":
            output, lse = packs.branched_attention_with_lse(*trunk, visible, scale)
        else:
            assert picked_TK is not None
            if target == "selected" and needs_gradients(*trunk):
                divergence = self._divergence_room(layer_index, query)
                output, loss = packs.teaching_attention(*trunk, *indexer, picked_TK, weights, divergence, scale)
                self._losses.setdefault(layer_index, loss)
                return output
            output = sparse_attention(*trunk, picked_TK, scale)
        if target == "dense":
            loss, divergence = packs.dense_indexer_loss(query, key, *indexer, visible, scale, weights, lse)
        else:
            assert picked_TK is not None
            if target == "selected":
                lse = None
            elif lse is None:
                lse = packs.branched_attention_lse(query, key, visible, scale)
            loss, divergence = packs.selected_indexer_loss(query, key, *indexer, picked_TK, scale, weights, lse)
        # A layer computed again must not be held here: the first loss, which is part of the step's, is the one to keep.
        self._losses.setdefault(layer_index, loss)
        self._divergences.setdefault(layer_index, divergence)
        return output

    def _divergence_room(self, layer_index: int, query_THD: Tensor) -> Tensor:
        """Where a layer's KL of each token is written to, the same whenever the layer is computed again."""
        if layer_index not in self._divergences:
            dtype = torch.float64 if query_THD.dtype == torch.float64 else torch.float32
            self._divergences[layer_index] = torch.zeros(query_THD.shape[0], dtype=dtype, device=query_THD.device)
        return self._divergences[layer_index]

    def _select(self, index: IndexerOutput, visible: VisibleKeys) -> tuple[Tensor | None, IndexerOutput]:
        """[T, K] picked keys where somebody needs them, and the indexer's output as it is scored."""
        needs_picked = self.attention == "sparse" or (self.teaching is not None and self.teaching.target != "dense")
        if not self.emulates_e4m3:
            if not needs_picked:
                return None, index
            return packs.branched_select(index.query_TJI, index.gates_TJ, index.key_TI, self.top_k, visible), index
        query_codes, query_scales = packs.quantize_vectors(index.query_TJI.detach())
        key_codes, key_scales = packs.quantize_vectors(index.key_TI.detach())
        picked = None
        if needs_picked:
            gates = index.gates_TJ.detach() * query_scales
            picked = packs.branched_select(query_codes, gates, key_codes, self.top_k, visible, key_scales)
        rounded = (
            _StraightThrough.apply(x, codes, scales)
            for x, codes, scales in ((index.query_TJI, query_codes, query_scales), (index.key_TI, key_codes, key_scales))
        )
        query, key = rounded
        return picked, IndexerOutput(query, index.gates_TJ, key)

    @cached_property
    def _runs(self) -> list[SampledRun]:
        assert self._visible is not None
        return sample_runs(self._visible, self.top_k)

    def _measure(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        index: IndexerOutput,
        picked_TK: Tensor | None,
        scale: float,
    ) -> None:
        assert self._visible is not None
        self._metrics[layer_index] = measure(
            query_THD.detach(), key_TGD.detach(), index, picked_TK, self._visible, self._runs, self.top_k, scale
        )


class _StraightThrough(torch.autograd.Function):
    """Numbers as e4m3 with one scale a vector holds them, exactly in any dtype of the model; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return (codes.float() * scales.unsqueeze(-1)).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None
