"""`LossModel`: one pack in, its part of the step's loss out. All calls of the network are made in here.

Sharded parameters are whole only inside the forward of the module that owns them, so embeddings, head, vision tower and
projector are used inside this one's.

Letters: T tokens, n tokens with a label, D width, L layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openkeye.data.packed_batch import PackedBatch
from openkeye.kernels.dispatch import cross_entropy
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.keye import KeyeModel
from openkeye.train.config import StageConfig
from openkeye.train.loss import ExpertLoad, StepCounts, balance_loss, expert_load
from openkeye.train.packed_past import PackedPast, Teaching
from openkeye.train.shard import decoder_layers


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


class LossModel(nn.Module):
    """A `KeyeModel` with its losses."""

    def __init__(self, keye: KeyeModel) -> None:
        super().__init__()
        self.keye = keye
        self.recomputes = False
        # activations of decoder layers are made again in the backward pass
        for layer in decoder_layers(keye):
            layer.forward = partial(self._run_layer, layer.forward)  # type: ignore[method-assign]

    def prepare(self, stage: StageConfig, recomputes: bool) -> None:
        """Set up for the passes of a stage."""
        # Where nothing in or below the decoder trains, its layers keep no activations, and have no gradients by which the ranks
        # would know when to gather their parameters again.
        self.recomputes = recomputes and any(part != "indexer" for part in stage.trains)
        for mixture in self.mixtures():
            mixture.keeps_router_logits = stage.balance_weight > 0
            mixture.router_logits = None

    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures of experts; a layer may have none."""
        return [layer.mlp for layer in decoder_layers(self.keye) if isinstance(layer.mlp, MixtureOfExperts)]

    def _run_layer(self, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(forward, *arguments, use_reentrant=False)
        return forward(*arguments)

    def forward(self, batch: PackedBatch, plan: PassPlan) -> PackLosses:
        """The losses of one pack, on the device of the parameters."""
        stage, keye = plan.stage, self.keye
        embeds_TD = self._embed(batch)
        weight = 1.0 / max(1, plan.counts.num_tokens)
        teaching = None
        if stage.indexer_target != "none":
            weights_T = torch.full((batch.num_tokens,), weight, device=batch.device)
            teaching = Teaching(stage.indexer_target, weights_T, stage.emulates_e4m3)
        past = PackedPast(batch.layout, keye.config.indexer.top_k, stage.attention, teaching, plan.wants_metrics)
        hidden_TD = keye(embeds_TD, batch.position_ids, past)
        terms = []
        token_losses = None
        if stage.answer_weight:
            hidden_nD, labels_n = (x.index_select(0, batch.learnt_positions) for x in (hidden_TD, batch.labels))
            losses_n = cross_entropy(hidden_nD, self._head_weight(hidden_TD), labels_n).loss_T
            terms.append(stage.answer_weight * losses_n.sum() / max(1, plan.counts.num_learnt))
            token_losses = losses_n.detach()
        if teaching is not None:
            terms.append(stage.indexer_weight * past.indexer_loss)
        load = None
        if plan.load_share_LE is not None:
            load, balance = self._balance(plan.load_share_LE, plan.counts.num_tokens)
            terms.append(stage.balance_weight * balance)
        return PackLosses(torch.stack([term.float() for term in terms]).sum(), token_losses, load, past)

    def _embed(self, batch: PackedBatch) -> Tensor:
        keye = self.keye
        if keye.config.vision is None:
            return keye.model.embed_tokens(batch.input_ids)
        patches = batch.patches()
        if patches is None:
            # Over no rows, so that this rank has gradients (zeros) for the parameters of which others have some to add.
            size, channels = keye.config.vision.patch_size, keye.config.vision.num_channels
            side = keye.config.vision.spatial_merge_size
            pixels = torch.zeros(0, side * side, channels, size, size, device=batch.device)
            vectors = keye.mlp_AR(keye.visual.vision_model(pixels, side, side), side, side)
        else:
            vectors = keye.encode_patches(patches)
        return keye.embed_at(batch.input_ids, batch.media_positions, vectors)

    def _head_weight(self, hidden_TD: Tensor) -> Tensor:
        keye = self.keye
        weight = keye.model.embed_tokens.weight if keye.config.tie_word_embeddings else keye.lm_head.weight
        return weight.to(hidden_TD.dtype)

    def _balance(self, share_LE: Tensor, num_tokens: int) -> tuple[ExpertLoad, Tensor]:
        logits = []
        for mixture in self.mixtures():
            assert mixture.router_logits is not None, "prepare() was told of no balance loss"
            logits.append(mixture.router_logits)
            mixture.router_logits = None
        load = expert_load(logits, self.keye.config.num_experts_per_tok)
        return load, balance_loss(share_LE, load.probability_LE, num_tokens)
