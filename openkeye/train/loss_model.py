"""`LossModel`: one pack in, its part of the step's loss out. All calls of the network are made in here.

Letters: T tokens, n tokens with a label, D width, L layers, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openkeye.data.packed_batch import PackedBatch
from openkeye.kernels.dispatch import cross_entropy
from openkeye.train.config import StageConfig
from openkeye.train.loss import ExpertLoad, StepCounts, balance_loss, expert_load
from openkeye.train.packed_model import PackedModel
from openkeye.train.packed_past import PackedPast, Teaching


@dataclass(frozen=True)
class PassPlan:
    """What one pass has to know besides its pack."""

    stage: StageConfig
    counts: StepCounts
    load_share_LE: Tensor | None
    # of all picks of the step before; None: no balance loss
    wants_metrics: bool = False
    # recall, mass and unique keys of the indexer's choice


class PackLosses(NamedTuple):
    """One pack's part of the step's loss, and what figures are made of (without gradient)."""

    total: Tensor
    # 0-dimensional, with gradient; its value may be whole after the backward pass only (`past.report`)
    token_losses: Tensor | None
    # [n] fp32, of the tokens with a label; None where the answers are not learnt
    load: ExpertLoad | None
    past: PackedPast


class LossModel(PackedModel):
    """A `KeyeModel` with its losses."""

    def prepare(self, stage: StageConfig, recomputes: bool) -> None:
        """Set up for the passes of a stage."""
        self.recompute(recomputes, stage.trains)
        for mixture in self.mixtures():
            mixture.keeps_router_logits = stage.balance_weight > 0
            mixture.router_logits = None

    def forward(self, batch: PackedBatch, plan: PassPlan) -> PackLosses:
        """The losses of one pack, on the device of the parameters."""
        stage, keye = plan.stage, self.keye
        embeds_TD = self.embed(batch, self.encode_pictures(batch))
        weight = 1.0 / max(1, plan.counts.num_tokens)
        teaching = None
        if stage.indexer_target != "none":
            weights_T = torch.full((batch.num_tokens,), weight, device=batch.device)
            teaching = Teaching(stage.indexer_target, weights_T)
        top_k, is_e4m3 = keye.config.indexer.top_k, stage.emulates_e4m3
        past = PackedPast(batch.layout, top_k, stage.attention, teaching, plan.wants_metrics, is_e4m3)
        hidden_TD = keye(embeds_TD, batch.position_ids, past)
        terms = []
        token_losses = None
        if stage.answer_weight:
            hidden_nD, labels_n = (x.index_select(0, batch.learnt_positions) for x in (hidden_TD, batch.labels))
            losses_n = cross_entropy(hidden_nD, self.head_weight(hidden_TD), labels_n).loss_T
            terms.append(stage.answer_weight * losses_n.sum() / max(1, plan.counts.num_learnt))
            token_losses = losses_n.detach()
        if teaching is not None:
            terms.append(stage.indexer_weight * past.indexer_loss)
        load = None
        if plan.load_share_LE is not None:
            load, balance = self._balance(plan.load_share_LE, plan.counts.num_tokens)
            terms.append(stage.balance_weight * balance)
        return PackLosses(torch.stack([term.float() for term in terms]).sum(), token_losses, load, past)

    def _balance(self, share_LE: Tensor, num_tokens: int) -> tuple[ExpertLoad, Tensor]:
        logits = []
        for mixture in self.mixtures():
            assert mixture.router_logits is not None, "prepare() was told of no balance loss"
            logits.append(mixture.router_logits)
            mixture.router_logits = None
        load = expert_load(logits, self.keye.config.num_experts_per_tok)
        return load, balance_loss(share_LE, load.probability_LE, num_tokens)
