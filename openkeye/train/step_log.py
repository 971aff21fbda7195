"""From a step's losses to the record of the log: sums wait on the device and are fetched once a record."""

import resource
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openkeye.common.device import upload
from openkeye.data.packed_batch import PackedBatch
from openkeye.train.config import StageConfig
from openkeye.train.flops import device_peak
from openkeye.train.loss import Figures, StepCounts, merge
from openkeye.train.loss_model import PackLosses
from openkeye.train.shard import Ranks

Record = dict[str, float | int | str]


@dataclass
class StepLog:
    """What has happened since the last record."""

    ranks: Ranks
    figures: Figures = field(default_factory=Figures)
    num_steps: int = 0
    num_tokens: float = 0.0
    flops: float = 0.0
    # of all ranks
    wait_seconds: float = 0.0
    # of this rank, for packs
    began: float = field(default_factory=time.monotonic)

    def add_pack(self, batch: PackedBatch, losses: PackLosses, counts: StepCounts) -> None:
        """After the pack's backward pass; `batch` is the one on the CPU."""
        if losses.token_losses is not None:
            self.figures.add("answer_loss", losses.token_losses.sum(), batch.num_learnt)
            tasks = sorted(set(batch.tasks) - {""})
            if tasks:
                sums, totals = task_sums(batch, losses.token_losses, tasks)
                for task, value, total in zip(tasks, sums.unbind(), totals, strict=True):
                    self.figures.add(f"loss/{task}", value, total)
        for name, value in losses.past.report().items():
            # The divergence is a share of the step's, the others are means over the pack.
            is_share = name == "indexer_kl"
            self.figures.add(name, value, 1 / counts.num_packs if is_share else 1.0)

    def add_step(self, gradient_norm: Tensor, balance: Tensor | None, counts: StepCounts, flops: float) -> None:
        """After the optimizer's step."""
        self.num_steps += 1
        self.num_tokens += counts.num_tokens
        self.flops += flops
        self.figures.add("gradient_norm", torch.where(gradient_norm.isfinite(), gradient_norm, torch.nan), 1.0)
        if balance is not None:
            self.figures.add("balance", balance, 1.0)

    def drain(self, stage: StageConfig, num_skipped: Tensor) -> Record:
        """The record of all ranks; waits for the device, and everything begins anew."""
        self.figures.add("num_skipped", num_skipped, 1.0)
        merged = merge(self.ranks.gather(self.figures.fetch()))
        # Only now everything has run.
        now = time.monotonic()
        seconds = now - self.began
        loss = (
            stage.answer_weight * merged.get("answer_loss", 0.0)
            + stage.indexer_weight * merged.get("indexer_kl", 0.0)
            + stage.balance_weight * merged.get("balance", 0.0)
        )
        record: Record = {"loss": loss, **merged, "num_skipped": round(merged["num_skipped"])}
        record["tokens_per_second"] = self.num_tokens / seconds
        record["seconds_per_step"] = seconds / self.num_steps
        record["wait_share"] = self.wait_seconds / seconds
        peak = device_peak(self.ranks.device)
        if peak is not None:
            record["peak_share"] = self.flops / (seconds * peak * self.ranks.size)
        record["memory_bytes"] = memory_bytes(self.ranks.device)
        self.num_steps, self.num_tokens, self.flops, self.wait_seconds, self.began = 0, 0.0, 0.0, 0.0, now
        return record


def task_sums(batch: PackedBatch, token_losses: Tensor, tasks: list[str]) -> tuple[Tensor, list[int]]:
    """[tasks]: each task's summed loss on the device of the losses; and how many tokens each has. `batch` is on the CPU."""
    place = {task: number for number, task in enumerate(tasks)}
    ends = torch.tensor([span.end for span in batch.layout.spans])
    # Documents without a task are summed apart, and left out.
    numbers = torch.tensor([place.get(task, len(tasks)) for task in batch.tasks])
    numbers_n = numbers[torch.searchsorted(ends, batch.learnt_positions, right=True)]
    totals = torch.bincount(numbers_n, minlength=len(tasks) + 1)[: len(tasks)].tolist()
    sums = token_losses.new_zeros(len(tasks) + 1).index_add(0, upload(numbers_n, token_losses.device), token_losses)
    return sums[: len(tasks)], totals


def memory_bytes(device: torch.device) -> int:
    """The most that was held so far: of the GPU by this process, or of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
