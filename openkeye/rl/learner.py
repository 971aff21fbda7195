"""The learner: rollouts in, optimizer steps out. Open this file first.

`Learner.update` ──> `learner_pack`: documents, packs ──> `PolicyModel` ──> `policy_loss` ──> backward ──> `Optimizer`

Under torchrun every rank makes one, and all call the same methods in the same order, each with samples of its own
(`learner_pack.share_out`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.learner_figures import LearnerFigures
from openkeye.rl.learner_pack import LearnerPack, LearnerSample, groups_of, join_groups, make_packs, silent_pack
from openkeye.rl.policy_loss import (
    LossCounts,
    PolicyTokens,
    Support,
    SupportDivergence,
    in_support_kl,
    policy_losses,
    sampled_divergences,
)
from openkeye.rl.policy_model import PolicyModel, PolicyOutput, PolicyPass
from openkeye.train.checkpoint import Checkpoints, Place
from openkeye.train.groups import trained_parameters
from openkeye.train.optimizer import Optimizer
from openkeye.train.shard import (
    Ranks,
    compile_regions,
    follow_what_trains,
    joined,
    pass_dtype,
    shard_parameters,
    training_device,
    units,
)
from openkeye.train.start import fill, loaded_weights, write_finished
from openkeye.train.step_log import Record


@contextmanager
def opened_learner(
    config: LearnerConfig,
    algorithm: AlgorithmConfig,
    device: torch.device | None = None,
    support_divergence: SupportDivergence = in_support_kl,
) -> Iterator["Learner"]:
    """A learner over the ranks that torchrun started, or this process alone, while the block runs.

    device: that computes; None: this rank's GPU, or the CPU where there is none.

    Raises:
        InputError: a checkpoint or settings that do not fit.
    """
    device = training_device() if device is None else device
    num_shards = config.num_shards or num_ranks()
    if num_ranks() % num_shards:
        raise InputError(f"learner: num_shards {num_shards} does not divide {num_ranks()} ranks")
    with joined(device, num_shards) as ranks:
        learner = Learner(config, algorithm, ranks, support_divergence)
        try:
            yield learner
        finally:
            learner.checkpoints.wait()


class Learner:
    """The policy that learns: masters in fp32, their optimizer, and the version that the weights have reached."""

    def __init__(
        self,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        ranks: Ranks,
        support_divergence: SupportDivergence = in_support_kl,
    ) -> None:
        """From `config.run_dir`'s latest checkpoint, or from `config.model_dir` where there is none.

        support_divergence: of samples whose streams have a support, how far a token is from its teacher.

        Raises:
            InputError: weights or settings that do not fit the model.
        """
        self.config, self.algorithm, self.ranks = config, algorithm, ranks
        self.support_divergence = support_divergence
        self.version = 0
        # of the weights; one more with every `step` or `update`
        self.num_steps = 0
        # of the optimizer
        self.notes: dict[str, Any] = {}
        # that were saved with the checkpoint from which it goes on
        self._num_saves = 0
        self.model_config = KeyeConfig.load(resolve_model_dir(config.model_dir))
        self._check_model()
        self._build()
        self.checkpoints = Checkpoints(Path(config.run_dir), ranks)
        if not self.load():
            fill(self.keye, lambda: loaded_weights(config.model_dir), ranks)

    def step(self, samples: Sequence[LearnerSample]) -> Record:
        """One optimizer step over all samples of all ranks.

        Returns:
            its figures (`LearnerFigures`), the same on every rank.

        Raises:
            InputError: no token of any rank has a weight, or a rollout is longer than a pack.
        """
        record = self._step(self._packs(samples))
        if record is None:
            raise InputError(f"nothing to learn: no token of {len(samples)} rollouts has a weight; leave such groups out")
        self.version += 1
        return record

    def update(self, samples: Sequence[LearnerSample]) -> list[Record]:
        """One optimizer step for each minibatch of whole groups; together they make one version.

        Where there are several, ratios are to the policy before the first (`AlgorithmConfig.proximal`), whose log-probabilities
        are computed first; pictures that nothing trains are computed with them, once.

        Returns:
            a record a minibatch; of those that had something to learn on some rank.

        Raises:
            InputError: no minibatch had, or a rollout is longer than a pack.
        """
        number = self.config.num_minibatches
        groups = groups_of(samples)
        bounds = np.linspace(0, len(groups), number + 1).round().astype(int).tolist()
        parts = [groups[start:end] for start, end in pairwise(bounds)]
        batches = [self._packs([sample for group in part for sample in group]) for part in parts]
        if number > 1 and self.algorithm.proximal == "trainer":
            batches = [self._with_proximal(packs) for packs in batches]
        records = [record for packs in batches if (record := self._step(packs)) is not None]
        if not records:
            raise InputError(f"nothing to learn: no token of {len(samples)} rollouts has a weight; leave such groups out")
        self.version += 1
        return records

    def logprobs(self, samples: Sequence[LearnerSample]) -> list[np.ndarray]:
        """[T] float32 of each sample: the policy's log-probability of its tokens now; 0 for those that nobody learns."""
        found = {id(sample): np.zeros(len(sample.rollout.output_ids), dtype=np.float32) for sample in samples}
        for pack in self._with_proximal(self._packs(samples)):
            segments, values = pack.tokens.segments.cpu().numpy(), pack.tokens.proximal.cpu().numpy()
            for number, member in enumerate(pack.members):
                found[id(member)][member.is_learnt] = values[segments == number]
        return [found[id(sample)] for sample in samples]

    def weights(self, is_whole: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Published names and whole tensors as passes compute with them, one after the other; all ranks go through them.

        is_whole: also those that do not train, and so are what `model_dir` holds.
        """
        dtype = pass_dtype(self.config.compute_dtype, self.ranks.device)
        trained = {one.name for one in self.optimizer.parameters}
        for name, parameter in self.keye.named_parameters():
            if is_whole or name in trained:
                tensor = parameter.detach()
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                # A copy: the next step writes into what this one shares.
                yield name, tensor.to(dtype, copy=True)

    def save(self, notes: Mapping[str, Any] | None = None, waits: bool = True) -> None:
        """A checkpoint with the version, which a process that is killed at any moment goes on from; all ranks call it.

        Args:
            notes: JSON of the caller's, such as how far its journal was read; comes back as `notes`.
            waits: until it is on disk; else it is written beside the next steps, one of which finds it done.

        Raises:
            InputError: it cannot be written; the one before is whole.
        """
        self._num_saves += 1
        policy = {"version": self.version, "num_steps": self.num_steps, "notes": dict(notes or {})}
        needed, moments = self._tensors()
        # Folders go by the number of the save: one of the same step never takes the place of another.
        place = Place(step=self._num_saves, stage=0, step_in_stage=0, policy=policy)
        self.checkpoints.save(place, {**needed, **moments})
        if waits:
            self.checkpoints.wait()

    def load(self) -> bool:
        """Go on from the latest checkpoint of `run_dir`; False where there is none."""
        place = self.checkpoints.place()
        if place is None:
            return False
        if place.policy is None:
            raise InputError(f"{self.config.run_dir} holds a run of openkeye train; give the policy a run_dir of its own")
        self.checkpoints.load(*self._tensors())
        self._num_saves = place.step
        self.version, self.num_steps = place.policy["version"], place.policy["num_steps"]
        self.notes = place.policy["notes"]
        return True

    def write_model(self, out_dir: Path) -> None:
        """The policy as a checkpoint in the published layout; all ranks call it.

        Raises:
            InputError: the folder cannot be written.
        """
        write_finished(self.keye, self.config.model_dir, out_dir, self.ranks)

    def _check_model(self) -> None:
        config = self.model_config
        if config.vision is None and (blind := [part for part in ("vision", "projector") if part in self.config.trains]):
            raise InputError(f"learner: {', '.join(blind)} cannot train: {self.config.model_dir} is a text model")

    def _build(self) -> None:
        config, device = self.config, self.ranks.device
        with torch.device("meta"):
            self.keye = KeyeModel(self.model_config)
            self.policy = PolicyModel(self.keye)
        if config.compiles:
            compile_regions(self.keye)
        shard_parameters(self.policy, self.keye, self.ranks, pass_dtype(config.compute_dtype, device))
        self.policy.to_empty(device=device)
        self.optimizer = Optimizer(device, config.clip, config.weight_decay)
        self.optimizer.train(trained_parameters(self.keye, config.trains, config.optimizer))
        follow_what_trains(self.policy)
        self.policy.recompute(config.recomputes, config.trains)

    def _packs(self, samples: Sequence[LearnerSample]) -> list[LearnerPack]:
        """On the device; as many on every rank."""
        config, model = self.config, self.model_config
        top_k = model.indexer.top_k if config.attention == "sparse" else None
        experts = (model.num_experts, model.num_experts_per_tok) if config.replays_routes and model.num_experts else None
        packs: list[LearnerPack] = []
        told = ""
        try:
            documents = join_groups(samples, config.tokens_per_pack, config.joins_groups)
            packs = make_packs(documents, config.tokens_per_pack, top_k, model.num_hidden_layers, experts)
        except InputError as error:
            told = str(error)
        # What one rank cannot take ends the step of all: the others would wait for it for ever.
        agreed = self.ranks.gather((len(packs), told))
        if errors := [error for _, error in agreed if error]:
            raise InputError(errors[0])
        packs += [silent_pack() for _ in range(max(number for number, _ in agreed) - len(packs))]
        return [pack.to(self.ranks.device) for pack in packs]

    @torch.no_grad()
    def _with_proximal(self, packs: Sequence[LearnerPack]) -> list[LearnerPack]:
        """The packs with the policy's log-probabilities of now, and the pictures' vectors where nothing trains them."""
        passed = []
        for pack in packs:
            output = self._run(pack, token_weight=0.0)
            tokens = replace(pack.tokens, proximal=output.logprobs)
            passed.append(replace(pack, tokens=tokens, has_proximal=True, vectors=output.vectors))
        # Without a backward pass parameters would stay gathered, and miss what is written into their parts.
        for unit in units(self.policy):
            unit.reshard()
        return passed

    def _run(self, pack: LearnerPack, token_weight: float, support_ids: Tensor | None = None) -> PolicyOutput:
        config = self.config
        teaches = config.indexer_target != "none" and torch.is_grad_enabled()
        plan = PolicyPass(
            attention=config.attention,
            indexer_target=config.indexer_target if teaches else "none",
            token_weight=token_weight,
            emulates_e4m3=config.emulates_e4m3,
            keeps_vectors=not {"vision", "projector"} & set(config.trains),
        )
        picks = (pack.pick_rows, pack.picks) if config.attention == "sparse" else (None, None)
        return self.policy(pack.batch, plan, support_ids, pack.routes, pack.vectors, *picks)

    def _step(self, packs: Sequence[LearnerPack]) -> Record | None:
        """One optimizer step; None where no token of any rank has a weight, and then nothing happened."""
        own = counts_of([member for pack in packs for member in pack.members], self.algorithm)
        num_tokens = float(sum(pack.batch.num_tokens for pack in packs if pack.members))
        rl, ce, ref_kl, num_tokens, num_packs = self.ranks.sum([own.rl, own.ce, own.ref_kl, num_tokens, float(len(packs))])
        if not rl + ce + ref_kl:
            return None
        figures = LearnerFigures(self.ranks)
        for pack in packs:
            # A silent pack has tokens too, and nobody learns from them.
            output = self._run(pack, 1 / num_tokens if pack.members else 0.0, pack.support_ids)
            tokens = self._tokens(pack, output)
            divergences_n, supports = self._divergences(pack, tokens, output)
            losses = policy_losses(self.algorithm, tokens, LossCounts(rl, ce, ref_kl), divergences_n)
            total = losses.total
            if self.config.indexer_target != "none":
                total = total + self.config.indexer_weight * output.past.indexer_loss
            total.backward()
            figures.add_pack(pack, tokens, output, losses, round(num_packs))
            figures.add_supports(pack, tokens, supports)
        norm = self.optimizer.step(self.config.rates_at(self.num_steps))
        self.num_steps += 1
        self.checkpoints.poll()
        record: Record = {"step": self.num_steps, "version": self.version + 1, "num_tokens": round(num_tokens)}
        record |= {f"rate/{part}": rate for part, rate in self.config.rates_at(self.num_steps - 1).items()}
        return record | figures.record(self.version, norm, self.optimizer.num_skipped)

    def _tokens(self, pack: LearnerPack, output: PolicyOutput) -> PolicyTokens:
        tokens = replace(pack.tokens, logprobs=output.logprobs)
        if self.algorithm.proximal == "trainer" and not pack.has_proximal:
            # The only step of its batch: the policy before it is this one.
            return replace(tokens, proximal=output.logprobs.detach())
        return tokens

    def _divergences(
        self, pack: LearnerPack, tokens: PolicyTokens, output: PolicyOutput
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """[n] with gradient: over supports where a token has one, else by its own log-probability; and figures of supports."""
        sampled_n = sampled_divergences(self.algorithm, tokens)
        if output.support is None or pack.support_ids is None or pack.support_logprobs is None:
            return sampled_n, {}
        found = self.support_divergence(tokens, Support(output.support, pack.support_logprobs, pack.support_ids))
        has_support_n = pack.has_support[tokens.segments]
        return torch.where(has_support_n, found.losses, sampled_n), found.figures

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a checkpoint has to hold, and what may be missing there."""
        needed = {f"model.{name}": parameter.detach() for name, parameter in self.keye.named_parameters()}
        return needed, {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}


def counts_of(samples: Sequence[LearnerSample], algorithm: AlgorithmConfig) -> LossCounts:
    """What these samples add to the step's counts."""
    weights = [sample.streams.rl_weights for sample in samples]
    counts = [int(np.count_nonzero(one)) for one in weights]
    num_rl = sum(counts) if algorithm.length_rule == "tokens" else sum(count > 0 for count in counts)
    num_ce = sum(int(np.count_nonzero(sample.streams.ce_weights)) for sample in samples)
    num_ref_kl = sum(int(np.count_nonzero(sample.streams.ref_kl_weights)) for sample in samples)
    return LossCounts(num_rl, num_ce, num_ref_kl)
