"""What a step of the learner tells: of the policy on the device, of its rollouts on the host; and one record of all ranks.

Letters: n learnt tokens of a pack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openkeye.rl.learner_pack import LearnerPack
from openkeye.rl.policy_loss import PolicyLosses, PolicyTokens, bounded, divergence
from openkeye.rl.policy_model import PolicyOutput
from openkeye.rl.rollout import Rollout
from openkeye.train.loss import Figures, merge
from openkeye.train.shard import Ranks
from openkeye.train.step_log import Record

NGRAM = 8
# tokens of a run that counts as repeated


@dataclass
class LearnerFigures:
    """Of one step. Sums wait on the device until `record` fetches them.

    | name | what |
    |---|---|
    | mismatch/mean_abs, mismatch/max_abs | of log pi - log mu over sampled tokens, pi the trainer's before the step |
    | mismatch/k3 | KL(mu, pi) by k3 |
    | mismatch/chi_square, effective_sample_size | of r = pi / mu: mean of r^2 less 1; (sum r)^2 / (n sum r^2) |
    | clip_low_share, clip_high_share, masked_share | of the policy loss's tokens |
    | update/k3 | how far the policy has gone from the one that ratios are to |
    | route_disagreement, route_disagreement_tokens | replayed pairs of token and layer routed elsewhere by these weights |
    | index_disagreement, index_disagreement_tokens | keys selected in answering that these weights do not select |
    | length, length_max, cut_share, repetition_share, age, age_max, reward/NAME | of rollouts |
    """

    ranks: Ranks
    pairs: Figures = field(default_factory=Figures)
    largest: list[Tensor] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    @torch.no_grad()
    def add_pack(
        self, pack: LearnerPack, tokens: PolicyTokens, output: PolicyOutput, losses: PolicyLosses, num_packs: int
    ) -> None:
        """After the pack's backward pass. num_packs: of all ranks."""
        self.rollouts += [member.rollout for member in pack.members]
        share = 1 / num_packs
        # Each pack has its part of the step's losses, and all of their denominators make 1.
        for name, value in (("rl", losses.rl), ("ce", losses.ce), ("ref_kl", losses.ref_kl), ("total", losses.total)):
            self.pairs.add(f"loss/{name}", value, share)
        if "indexer_kl" in (report := output.past.report()):
            self.pairs.add("indexer_kl", report["indexer_kl"], share)
        for name, number, total in zip(
            ("route_disagreement", "route_disagreement_tokens"), output.num_rerouted.unbind(), pack.num_replayed, strict=True
        ):
            if total:
                self.pairs.add(name, number, total)
        if output.num_repicked is not None and pack.picks is not None:
            num_keys, num_tokens = output.num_repicked.unbind()
            self.pairs.add("index_disagreement", num_keys, pack.num_picks)
            self.pairs.add("index_disagreement_tokens", num_tokens, pack.picks.shape[1])
        if pack.num_policy:
            self._add_sampled(pack, tokens, output)
        if pack.num_rl:
            surrogate = losses.surrogate
            masks = {"clip_low": surrogate.is_clipped_low, "clip_high": surrogate.is_clipped_high, "masked": losses.is_masked}
            for name, mask in masks.items():
                self.pairs.add(f"{name}_share", (mask & tokens.is_rl).sum(), pack.num_rl)

    @torch.no_grad()
    def add_supports(self, pack: LearnerPack, tokens: PolicyTokens, supports: Mapping[str, Tensor]) -> None:
        """What an estimator tells of supports: means over the tokens with a reference that have one to look at."""
        if not supports or not pack.num_supported:
            return
        is_counted_n = (tokens.ref_kl_weights != 0) & pack.has_support[tokens.segments]
        for name, values_n in supports.items():
            self.pairs.add(f"support/{name}", torch.where(is_counted_n, values_n, 0.0).sum(), pack.num_supported)

    def _add_sampled(self, pack: LearnerPack, tokens: PolicyTokens, output: PolicyOutput) -> None:
        def add(name: str, values_n: Tensor) -> None:
            self.pairs.add(name, torch.where(pack.is_policy, values_n, 0.0).sum(), pack.num_policy)

        trainer_n = tokens.proximal if pack.has_proximal else tokens.logprobs.detach()
        difference_n = torch.where(pack.is_policy, trainer_n - tokens.rollout, 0.0)
        ratio_n = bounded(difference_n).exp()
        add("mismatch/mean_abs", difference_n.abs())
        add("mismatch/k3", divergence("k3", -difference_n))
        add("mismatch/ratio", ratio_n)
        add("mismatch/ratio_square", ratio_n.square())
        add("update/k3", divergence("k3", tokens.proximal - tokens.logprobs.detach()))
        add("entropy", output.entropy)
        add("advantage_abs", tokens.advantages.abs())
        self.largest.append(difference_n.abs().max())

    def record(self, version: int, gradient_norm: Tensor, num_skipped: Tensor) -> Record:
        """The figures of all ranks; the same on each. Waits for the device."""
        self.pairs.add("gradient_norm", torch.where(gradient_norm.isfinite(), gradient_norm, torch.nan), 1.0)
        self.pairs.add("num_skipped", num_skipped, 1.0)
        largest = float(torch.stack(self.largest).max()) if self.largest else 0.0
        told = self.ranks.gather((self.pairs.fetch(), largest, rollout_figures(self.rollouts, version)))
        record: Record = dict(merge([pairs for pairs, _, _ in told]))
        record |= merge([means for _, _, (means, _) in told])
        for name in ("length_max", "age_max"):
            record[name] = max(maxima[name] for _, _, (_, maxima) in told)
        record["mismatch/max_abs"] = max(one for _, one, _ in told)
        if "mismatch/ratio" in record:
            ratio, square = float(record.pop("mismatch/ratio")), float(record.pop("mismatch/ratio_square"))
            record["mismatch/chi_square"] = square - 1
            record["effective_sample_size"] = ratio**2 / square
        record["num_skipped"] = round(float(record["num_skipped"]))
        return record


def rollout_figures(rollouts: Sequence[Rollout], version: int) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """(sum, number) by name, and maxima."""
    sums: dict[str, tuple[float, float]] = {}

    def add(name: str, value: float) -> None:
        total, number = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, number + 1)

    for rollout in rollouts:
        add("length", rollout.num_policy_tokens)
        add("cut_share", rollout.finish_reason == "length")
        add("repetition_share", repetition_share(rollout.output_ids[rollout.is_policy]))
        add("age", rollout.age(version))
        for name, value in rollout.rewards.items():
            add(f"reward/{name}", value)
    maxima = {
        "length_max": float(max((rollout.num_policy_tokens for rollout in rollouts), default=0)),
        "age_max": float(max((rollout.age(version) for rollout in rollouts), default=0)),
    }
    return sums, maxima


def repetition_share(ids: np.ndarray, ngram: int = NGRAM) -> float:
    """The share of a text's runs of `ngram` tokens that have stood in it before; 0 for a shorter text."""
    if len(ids) < ngram:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(ids), ngram)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)
