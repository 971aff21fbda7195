"""`PolicyModel`: one pack in, what the policy says of its learnt tokens out. All calls of the network are made in here.

Letters: T tokens, n learnt tokens, M media tokens, D width, V vocabulary, K tokens of a support or selected
keys, L layers, N tokens whose selected keys are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.data.packed_batch import PackedBatch
from openkeye.kernels.dispatch import cross_entropy, widen
from openkeye.train.packed_model import PackedModel
from openkeye.train.packed_past import PackedPast, Teaching

SLAB_BYTES = 64 << 20
# of head rows that stand in memory at a time beside a support


@dataclass(frozen=True)
class PolicyPass:
    """How a pass is run."""

    attention: str
    indexer_target: str = "none"
    token_weight: float = 0.0
    # of each token in the indexer's KL: 1 / (tokens of all packs of the step)
    emulates_e4m3: bool = False
    keeps_vectors: bool = False
    # whether the pictures' vectors come back, for the next pass of the same pack


@dataclass(frozen=True)
class PolicyOutput:
    """What a pass says of the tokens with a label; fp32."""

    logprobs: Tensor
    # [n]: log-probability of the label, with gradient
    entropy: Tensor
    # [n], in nats
    support: Tensor | None
    # [n, K]: log-probabilities of the support's tokens, with gradient; 0 where unused
    past: PackedPast
    vectors: Tensor | None
    # [M, D] of the pictures, where they are kept
    num_rerouted: Tensor
    # [2]: (token, layer) pairs that were replayed elsewhere than these weights would send them, and tokens with such a layer
    num_repicked: Tensor | None = None
    # [2]: keys that attention selected in answering and does not here, and tokens with such a key; None: nothing to compare


class PolicyModel(PackedModel):
    """A `KeyeModel` as a policy."""

    def forward(
        self,
        batch: PackedBatch,
        plan: PolicyPass,
        support_ids_nK: Tensor | None = None,
        routes_LTK: Tensor | None = None,
        vectors_MD: Tensor | None = None,
        pick_rows_N: Tensor | None = None,
        picks_LNK: Tensor | None = None,
    ) -> PolicyOutput:
        """Run a pack on the device of the parameters.

        Args:
            support_ids_nK: tokens whose log-probabilities are wanted beside the label's, -1 where unused.
            routes_LTK: experts that tokens are sent to, rows of -1 live (`reference_learning.route_as`); None: all live.
            vectors_MD: of the pictures, from an earlier pass.
            pick_rows_N: tokens whose selected keys are compared with picks_LNK, those of answering.
        """
        keye = self.keye
        if vectors_MD is None:
            vectors_MD = self.encode_pictures(batch)
        self.routes = None if routes_LTK is None else [ids_TK.long() for ids_TK in routes_LTK.unbind()]
        teaching = None
        if plan.indexer_target != "none":
            weights_T = torch.full((batch.num_tokens,), plan.token_weight, device=batch.device)
            teaching = Teaching(plan.indexer_target, weights_T)
        past = PackedPast(
            batch.layout,
            keye.config.indexer.top_k,
            plan.attention,
            teaching,
            emulates_e4m3=plan.emulates_e4m3,
            kept_rows_N=pick_rows_N,
        )
        hidden_TD = keye(self.embed(batch, vectors_MD), batch.position_ids, past)
        self.routes = None
        head_VD = self.head_weight(hidden_TD)
        hidden_nD, labels_n = (x.index_select(0, batch.learnt_positions) for x in (hidden_TD, batch.labels))
        found = cross_entropy(hidden_nD, head_VD, labels_n)
        support = None
        if support_ids_nK is not None:
            logits_nK = LogitsAt.apply(hidden_nD, head_VD, support_ids_nK)
            support = torch.where(support_ids_nK < 0, 0.0, logits_nK - found.lse_T[:, None])
        return PolicyOutput(
            found.log_probability_T,
            found.entropy_T,
            support,
            past,
            vectors_MD.detach() if plan.keeps_vectors and vectors_MD is not None else None,
            self._num_rerouted(routes_LTK),
            num_repicked(past.kept_picks, picks_LNK),
        )

    @torch.no_grad()
    def _num_rerouted(self, routes_LTK: Tensor | None) -> Tensor:
        if routes_LTK is None:
            return torch.zeros(2, device=self.keye.model.norm.weight.device)
        rerouted = [mixture.rerouted_T for mixture in self.mixtures()]
        rerouted_LT = torch.stack([one for one in rerouted if one is not None])
        for mixture in self.mixtures():
            mixture.rerouted_T = None
        return torch.stack([rerouted_LT.sum(), rerouted_LT.any(dim=0).sum()]).float()


@torch.no_grad()
def num_repicked(own: Mapping[int, Tensor], picks_LNK: Tensor | None) -> Tensor | None:
    """[2]: how many of the keys [L, N, K] are not among own ones (by layer [N, k]), and tokens with such a key; -1 is none."""
    if picks_LNK is None or not own:
        return None
    # A layer at a time: sorted together, a key that both have has an equal neighbour.
    missing_LN = []
    for layer, given_NK in enumerate(picks_LNK.unbind()):
        both = torch.cat([given_NK.masked_fill(given_NK < 0, -2), own[layer].to(given_NK.dtype)], dim=1).sort(dim=1).values
        num_shared_N = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(dim=1)
        missing_LN.append((given_NK >= 0).sum(dim=1) - num_shared_N)
    missing = torch.stack(missing_LN)
    return torch.stack([missing.sum(), (missing > 0).any(dim=0).sum()]).float()


class LogitsAt(torch.autograd.Function):
    """Logits of chosen tokens, [n, K] in fp32 (fp64 of fp64): hidden_n . head[ids], row slabs at a time, in both directions."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_nD: Tensor, head_VD: Tensor, ids_nK: Tensor) -> Tensor:
        """0 where an id is negative."""
        safe_nK = ids_nK.clamp_min(0)
        ctx.save_for_backward(hidden_nD, head_VD, safe_nK, ids_nK < 0)
        logits_nK = torch.empty(ids_nK.shape, dtype=widen(hidden_nD[:0]).dtype, device=hidden_nD.device)
        for rows in _slabs(safe_nK, head_VD):
            torch.bmm(widen(head_VD[safe_nK[rows]]), widen(hidden_nD[rows]).unsqueeze(2), out=logits_nK[rows].unsqueeze(2))
        return logits_nK.masked_fill(ids_nK < 0, 0.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and the head, in their dtype, summed in fp32."""
        hidden_nD, head_VD, safe_nK, is_unused_nK = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient_nK = gradients[0].masked_fill(is_unused_nK, 0.0)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        wide = gradient_nK.dtype
        hidden_gradient = torch.empty(hidden_nD.shape, dtype=wide, device=hidden_nD.device) if needs_hidden else None
        head_gradient = torch.zeros(head_VD.shape, dtype=wide, device=head_VD.device) if needs_head else None
        for rows in _slabs(safe_nK, head_VD):
            if hidden_gradient is not None:
                products = torch.bmm(gradient_nK[rows].unsqueeze(1), widen(head_VD[safe_nK[rows]]))
                hidden_gradient[rows] = products[:, 0]
            if head_gradient is not None:
                each = gradient_nK[rows].unsqueeze(2) * widen(hidden_nD[rows]).unsqueeze(1)
                head_gradient.index_add_(0, safe_nK[rows].flatten(), each.flatten(0, 1))
        cast = [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in ((hidden_gradient, hidden_nD), (head_gradient, head_VD))
        ]
        return cast[0], cast[1], None


def _slabs(ids_nK: Tensor, head_VD: Tensor) -> list[slice]:
    rows = max(1, SLAB_BYTES // max(1, 4 * ids_nK.shape[1] * head_VD.shape[1]))
    return [slice(start, start + rows) for start in range(0, ids_nK.shape[0], rows)]
