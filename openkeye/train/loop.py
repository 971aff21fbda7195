"""The heart of training: take a step's packs, compute the losses, step, log, save. Open this file first.

A run is a list of stages (`config.py`); it can stop after any step and go on, on this machine or on another number of ranks.

`Trainer.run` ──> `_run_stage` ──> `_step`: packs (`data/loader.py`) ──> `LossModel` ──> backward ──> `Optimizer` ──> `StepLog`
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks
from openkeye.common.log import JsonLines, forget_after
from openkeye.data.config import LoaderConfig
from openkeye.data.loader import merge_states
from openkeye.data.packed_batch import PackedBatch
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.train.checkpoint import Checkpoints, Place
from openkeye.train.config import RunConfig, StageConfig
from openkeye.train.flops import decoder_flops, pass_flops
from openkeye.train.groups import trained_parameters
from openkeye.train.interrupts import Interrupts
from openkeye.train.loss import StepCounts, balance_loss
from openkeye.train.loss_model import LossModel, PassPlan
from openkeye.train.open_loader import OpenLoader
from openkeye.train.optimizer import Optimizer
from openkeye.train.refusals import check_run, check_run_dir, claim_run_dir
from openkeye.train.reporter import Reporter
from openkeye.train.schedule import rates_at
from openkeye.train.shard import (
    Ranks,
    compile_regions,
    follow_what_trains,
    joined,
    pass_dtype,
    shard_parameters,
    training_device,
)
from openkeye.train.start import fill, first_weights, is_all_fresh, write_finished
from openkeye.train.step_log import Record, StepLog

LOG_FILE = "log.jsonl"


class StageLoader(Protocol):
    """What the trainer asks of `data.loader.Loader`."""

    def __iter__(self) -> Iterator[list[PackedBatch]]: ...

    def __next__(self) -> list[PackedBatch]: ...

    def state(self) -> dict[str, Any]: ...

    def figures(self) -> Any: ...

    def close(self) -> None: ...


MakeLoader = Callable[[LoaderConfig, Ranks, Mapping[str, Any] | None], StageLoader]


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step before its first pass, from one sum over hosts."""

    counts: StepCounts
    flops: float
    stops: bool
    saves: bool


class Trainer:
    """One run from its first step, or from where it was left, to a finished model."""

    def __init__(
        self,
        config: RunConfig,
        reporter: Reporter,
        make_loader: MakeLoader | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            config: the whole run.
            reporter: told of the run's progress by rank 0.
            make_loader: where the packs of a stage come from; None: from `config.sources`.
            device: that computes; None: this rank's GPU, or the CPU where there is none.

        Raises:
            InputError: settings that do not fit the model, the ranks or the folder; before anything is loaded.
        """
        self.config = config
        self.reporter = reporter
        self.device = training_device() if device is None else device
        self.run_dir = Path(config.run_dir)
        self.model_config = KeyeConfig.load(resolve_model_dir(config.model_dir))
        self.notices = check_run(config, self.model_config, num_ranks())
        check_run_dir(config)
        self.make_loader: MakeLoader = OpenLoader(config) if make_loader is None else make_loader

    def run(self, stop_after_seconds: float = math.inf) -> bool:
        """Train until the last step, the time limit, or Ctrl-C; then save. Under torchrun all ranks call it.

        Returns:
            True where the run is finished and `out_dir` holds the model.

        Raises:
            InputError: weights, data, or folders that cannot be read or written.
        """
        deadline = time.monotonic() + stop_after_seconds
        num_shards = self.config.num_shards or num_ranks()
        with joined(self.device, num_shards) as ranks, Interrupts() as interrupts:
            self.ranks, self.interrupts, self.deadline = ranks, interrupts, deadline
            if ranks.rank == 0:
                claim_run_dir(self.config)
            return self._run()

    def _run(self) -> bool:
        for notice in self.notices:
            self._say(notice)
        self._build()
        self.checkpoints = Checkpoints(self.run_dir, self.ranks)
        self.saved_at = self.began = time.monotonic()
        place = self._begin()
        if self.ranks.rank == 0:
            forget_after(self.run_dir / LOG_FILE, place.step)
        with closing(JsonLines(self.run_dir / LOG_FILE)) if self.ranks.rank == 0 else nullcontext() as self.log:
            while place.stage < len(self.config.stages):
                self._begin_stage(place.stage)
                place, is_stopped = self._run_stage(place)
                self._save(place)
                if is_stopped and place.stage < len(self.config.stages):
                    self.checkpoints.wait()
                    why = "interrupted" if self.interrupts.is_asked else "out of time"
                    self._say(f"{why}: step {place.step} is saved in {self.run_dir}; start the same run again to go on from it")
                    return False
        self.checkpoints.wait()
        keeps_tensors = not is_all_fresh(self.config)
        write_finished(self.keye, self.config.model_dir, Path(self.config.out_dir), self.ranks, keeps_tensors)
        self._say(f"finished: {self.config.out_dir} holds the model")
        return True

    def _begin(self) -> Place:
        """Fill the network, from the latest checkpoint or anew."""
        place = self.checkpoints.place()
        if place is None:
            fill(self.keye, lambda: first_weights(self.config, self.model_config), self.ranks)
            return Place(step=0, stage=0, step_in_stage=0)
        self._say(f"going on from step {place.step} of {self.config.num_steps}")
        self._begin_stage(place.stage)
        self.checkpoints.load(*self._tensors())
        return place

    def _build(self) -> None:
        """The network with its parameters shared out, still empty."""
        config, device = self.config, self.ranks.device
        with torch.device("meta"):
            self.keye = KeyeModel(self.model_config)
            self.loss_model = LossModel(self.keye)
        self.flops_per_token = decoder_flops(self.keye)
        num_mixtures = len(self.loss_model.mixtures())
        for stage in config.stages:
            if stage.balance_weight and not num_mixtures:
                raise InputError(f"stage {stage.name!r}: balance_weight balances experts, and the model has none; set it to 0")
        if config.compiles:
            compile_regions(self.keye)
        shard_parameters(self.loss_model, self.keye, self.ranks, pass_dtype(config.compute_dtype, device))
        self.loss_model.to_empty(device=device)
        self.optimizer = Optimizer(device, config.clip, config.weight_decay)
        # Experts' shares of the picks of the step before, over all packs and ranks: known before a step's first backward pass.
        shares = torch.ones(num_mixtures, self.model_config.num_experts, device=device)
        self.load_shares = shares / max(1, self.model_config.num_experts)

    def _begin_stage(self, number: int) -> None:
        """What trains from now on, and how."""
        if number == len(self.config.stages):
            return
        stage = self.config.stages[number]
        rules = (self.config.optimizer, self.config.indexer_optimizer)
        self.optimizer.train(trained_parameters(self.keye, stage.trains, *rules))
        follow_what_trains(self.loss_model)
        self.loss_model.prepare(stage, self.config.recomputes)

    def _run_stage(self, place: Place) -> tuple[Place, bool]:
        """To the stage's end or an earlier stop: where the run is then, and whether it stops there."""
        stage = self.config.stages[place.stage]
        if self.ranks.rank == 0:
            self.reporter.stage(stage.name, stage.num_steps)
        self.step_log = StepLog(self.ranks)
        following = replace(place, stage=place.stage + 1, step_in_stage=0, loader_state=None)
        loader = self.make_loader(self._loader_config(stage), self.ranks, place.loader_state)
        try:
            for number in range(place.step_in_stage, stage.num_steps):
                began = time.monotonic()
                packs = next(loader)
                self.step_log.wait_seconds += time.monotonic() - began
                agreed = self._agree(packs, stage)
                self._step(packs, stage, number, agreed)
                step, is_last = place.step + number + 1 - place.step_in_stage, number + 1 == stage.num_steps
                following = replace(following, step=step)
                if step % self.config.log_every == 0 or is_last or agreed.stops:
                    record = self._log(stage, number, step, loader)
                    is_last = is_last or _has_reached(record, stage)
                if is_last:
                    return following, agreed.stops
                if agreed.stops or agreed.saves:
                    here = Place(step, place.stage, number + 1, merge_states(self.ranks.gather(loader.state())))
                    if agreed.stops:
                        return here, True
                    self._save(here)
                self.checkpoints.poll()
        finally:
            loader.close()
        raise AssertionError("a stage has at least one step")

    def _agree(self, packs: list[PackedBatch], stage: StageConfig) -> Agreement:
        leads = self.ranks.rank == 0
        now = time.monotonic()
        own = [
            float(sum(pack.num_tokens for pack in packs)),
            float(sum(pack.num_learnt for pack in packs)),
            float(len(packs)),
            sum(pass_flops(self.model_config, self.flops_per_token, stage, pack) for pack in packs),
            float(self.interrupts.is_asked or (leads and now > self.deadline)),
            float(leads and now - self.saved_at > self.config.save_every_seconds),
        ]
        num_tokens, num_learnt, num_packs, flops, stops, saves = self.ranks.sum(own)
        counts = StepCounts(round(num_tokens), round(num_learnt), round(num_packs))
        return Agreement(counts, flops, stops > 0, saves > 0)

    def _step(self, packs: list[PackedBatch], stage: StageConfig, number: int, agreed: Agreement) -> None:
        """One optimizer step; figures gather on the device and reach the host only when logged."""
        has_indexer = stage.attention == "sparse" or stage.indexer_target != "none"
        plan = PassPlan(
            stage,
            agreed.counts,
            self.load_shares if stage.balance_weight else None,
            wants_metrics=has_indexer and number % self.config.metrics_every == 0,
        )
        loads = []
        for pack in packs:
            losses = self.loss_model(pack.to(self.ranks.device), plan)
            losses.total.backward()
            self.step_log.add_pack(pack, losses, agreed.counts)
            loads.append(losses.load)
        balance = self._balance([load.joined() for load in loads if load is not None], agreed.counts)
        norm = self.optimizer.step(rates_at(stage, number))
        self.step_log.add_step(norm, balance, agreed.counts, agreed.flops)

    def _balance(self, loads: list[Tensor], counts: StepCounts) -> Tensor | None:
        """The step's balance loss of all ranks, and the shares that the next step's gradients go by."""
        if not loads:
            return None
        picks_LE, probability_LE = self.ranks.add(torch.stack(loads).sum(dim=0)).unbind()
        self.load_shares = picks_LE / (counts.num_tokens * self.model_config.num_experts_per_tok)
        return balance_loss(self.load_shares, probability_LE, counts.num_tokens)

    def _log(self, stage: StageConfig, number: int, step: int, loader: StageLoader) -> Record:
        drained = self.step_log.drain(stage, self.optimizer.num_skipped)
        seconds_left = (self.config.num_steps - step) * float(drained["seconds_per_step"])
        record: Record = {"step": step, "stage": stage.name, "step_in_stage": number + 1, **drained}
        record |= {f"rate/{part}": rate for part, rate in rates_at(stage, number).items()}
        record |= {"seconds": time.monotonic() - self.began, "seconds_left": seconds_left}
        record |= loader_record(self.ranks.gather(loader.figures()))
        if self.log is not None:
            self.log.write(**record)
            self.reporter.step(record)
        return record

    def _say(self, text: str) -> None:
        if self.ranks.rank == 0:
            self.reporter.say(text)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Everything that a checkpoint holds: what has to be there, and what may be missing."""
        needed = {f"model.{name}": parameter.detach() for name, parameter in self.keye.named_parameters()}
        if self.load_shares.numel():
            needed["load_shares"] = self.load_shares
        return needed, {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}

    def _save(self, place: Place) -> None:
        needed, moments = self._tensors()
        self.checkpoints.save(place, {**needed, **moments})
        self.saved_at = time.monotonic()

    def _loader_config(self, stage: StageConfig) -> LoaderConfig:
        config = self.config
        return LoaderConfig(
            context=stage.context,
            tokens_per_pack=stage.pack_size,
            packs_per_step=stage.packs_per_step,
            shares=stage.mixture,
            num_steps=stage.num_steps,
            seed=config.seed,
            num_workers=config.num_workers,
            max_bad_share=config.max_bad_share,
            max_clip_seconds=stage.max_clip_seconds,
            video_tokens=stage.video_tokens,
            top_k=self.model_config.indexer.top_k if stage.attention == "sparse" else None,
            stage=stage.name,
        )


def loader_record(figures: list[Any]) -> Record:
    """What was read of all ranks, for the log."""
    num_steps = max(1, sum(one.num_steps for one in figures))
    record: Record = {
        "loader/num_read": sum(one.num_read for one in figures),
        "loader/num_bad": sum(one.num_bad for one in figures),
        "loader/num_too_long": sum(one.num_too_long for one in figures),
        "loader/fill_share": sum(one.fill_share * one.num_steps for one in figures) / num_steps,
    }
    for one in figures:
        for source, num_tokens in one.tokens_by_source.items():
            name = f"loader/tokens/{source}"
            record[name] = int(record.get(name, 0)) + num_tokens
    return record


def _has_reached(record: Record, stage: StageConfig) -> bool:
    recall = record.get("indexer_recall")
    return stage.stop_at_recall is not None and recall is not None and float(recall) >= stage.stop_at_recall
