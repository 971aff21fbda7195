"""What sparse attention costs in learning: dense and sparse twins on equal data, and the gap of their losses.

    python -m benchmarks.twins --model DENSE_DIR --warm-up 100 --steps 40 --seeds 3

From one dense model the indexer is warmed up once. Then for every seed two twins go on from there, over the same samples in the
same packs at the same rates: one attends densely, the other sparsely, its indexer learning along. Both are read on the same
held-out clips, each in its own attention. The gap is sparse minus dense in nats an answer token, with a 95% interval over seeds
(Student's t): 0 inside it means that these runs cannot tell the twins apart. Beside it stands the gap before the twins part.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from openkeye.data.config import Share, SourceConfig
from openkeye.data.packed_batch import PackedBatch, pack
from openkeye.data.sources.frameforge import frameforge_source
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.weights import load_model
from openkeye.train.config import RunConfig, StageConfig
from openkeye.train.loop import Trainer
from openkeye.train.loss import StepCounts
from openkeye.train.loss_model import LossModel, PassPlan
from openkeye.train.reporter import SilentReporter

HELD_OUT_SEED = 1_000_003
# of clips that no twin learns from
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# 97.5% quantiles by degrees of freedom
ATTENTIONS = ("dense", "sparse")


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    frames: str
    context: int
    tokens: int
    # of a step's pack
    rate: float
    num_held_out: int
    # clips
    work: Path
    num_workers: int

    def stage(self, attention: str, num_steps: int) -> StageConfig:
        """One twin's stage."""
        is_sparse = attention == "sparse"
        return StageConfig(
            attention,
            num_steps,
            context=self.context,
            tokens_per_pack=self.tokens,
            mixture=(Share("clips"),),
            trains=("vision", "projector", "decoder", *(["indexer"] if is_sparse else [])),
            attention=attention,
            indexer_target="selected" if is_sparse else "none",
            rates={"indexer": 10 * self.rate} if is_sparse else {},
            rate=self.rate,
            rate_end_share=0.1,
            num_warmup_steps=num_steps // 10,
            balance_weight=0.01,
        )

    def warm_up_stage(self, num_steps: int) -> StageConfig:
        """The indexer alone, from dense attention."""
        return StageConfig(
            "warm-up",
            num_steps,
            context=self.context,
            tokens_per_pack=self.tokens,
            mixture=(Share("clips"),),
            trains=("indexer",),
            indexer_target="dense",
            answer_weight=0.0,
            rate=2e-2,
            num_warmup_steps=num_steps // 20,
        )

    def train(self, model_dir: str, name: str, stage: StageConfig, seed: int, is_fresh: bool = False) -> str:
        """The folder of the trained model; a run that is there already is not repeated."""
        out = self.work / f"{name}-{seed}"
        if not (out / "config.json").is_file():
            config = RunConfig(
                model_dir=model_dir,
                run_dir=str(self.work / f"{name}-{seed}-run"),
                out_dir=str(out),
                sources={"clips": SourceConfig("frameforge_videos", options={"frames": self.frames, "seed": seed})},
                stages=(stage,),
                seed=seed,
                fresh=("indexer",) if is_fresh else (),
                optimizer="muon",
                indexer_optimizer="muon",
                num_workers=self.num_workers,
                has_tensorboard=False,
            )
            Trainer(config, SilentReporter()).run()
        return str(out)

    def held_out_packs(self, model_dir: str) -> list[PackedBatch]:
        """The same clips for everyone."""
        options = {"frames": self.frames, "seed": HELD_OUT_SEED}
        source = frameforge_source("frameforge_videos", str(resolve_model_dir(model_dir)), options)
        return [pack([source.read(number)]) for number in range(self.num_held_out)]


@torch.no_grad()
def held_out_loss(model_dir: str, packs: list[PackedBatch], stage: StageConfig) -> float:
    """Mean loss of an answer's token, in nats, in the stage's attention."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(resolve_model_dir(model_dir), device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    loss_model = LossModel(model)
    loss_model.prepare(stage, recomputes=False)
    total, count = 0.0, 0
    for one in packs:
        losses = loss_model(one.to(device), PassPlan(stage, StepCounts(one.num_tokens, one.num_learnt, 1), None))
        assert losses.token_losses is not None
        total += float(losses.token_losses.sum())
        count += one.num_learnt
    return total / count


def mean_with_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high), 95% by Student's t; one value has no interval and gives NaN."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = STUDENT_T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Dense and sparse twins on equal data.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a dense model")
    parser.add_argument("--warm-up", type=int, default=0, metavar="STEPS", help="of a fresh indexer; 0: its own is kept")
    parser.add_argument("--steps", type=int, default=40, help="of each twin")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N", help="1 to 10")
    parser.add_argument("--frames", default="16..60", help="of the clips, as in the reader frameforge_videos")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=64, metavar="CLIPS")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--work", default=None, metavar="DIR", help="keep the runs here; the same command goes on there")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            arguments.frames,
            arguments.context,
            arguments.tokens,
            arguments.rate,
            arguments.held_out,
            Path(arguments.work or scratch),
            arguments.workers,
        )
        print(json.dumps(compare(setting, arguments.model, arguments.warm_up, arguments.steps, arguments.seeds)))
    return 0


def compare(setting: Setting, model_dir: str, warm_up_steps: int, num_steps: int, num_seeds: int) -> dict:
    """The table of the twins' losses."""
    start = model_dir
    if warm_up_steps:
        start = setting.train(model_dir, "warm-up", setting.warm_up_stage(warm_up_steps), 0, is_fresh=True)
    packs = setting.held_out_packs(start)
    stages = {attention: setting.stage(attention, num_steps) for attention in ATTENTIONS}
    before = {attention: held_out_loss(start, packs, stage) for attention, stage in stages.items()}
    print(f"before: {before}", file=sys.stderr, flush=True)
    after: dict[str, list[float]] = {attention: [] for attention in ATTENTIONS}
    for seed in range(1, num_seeds + 1):
        for attention, stage in stages.items():
            trained = setting.train(start, attention, stage, seed)
            after[attention].append(held_out_loss(trained, packs, stage))
            print(f"seed {seed}, {attention}: {after[attention][-1]:.4f}", file=sys.stderr, flush=True)
    gaps = [sparse - dense for dense, sparse in zip(after["dense"], after["sparse"], strict=True)]
    mean, low, high = mean_with_interval(gaps)
    return {
        "before": before,
        "after": after,
        "gap": {"mean": mean, "interval": [low, high]},
        "gap_before": before["sparse"] - before["dense"],
        "steps": num_steps,
        "warm_up_steps": warm_up_steps,
        "tokens_per_step": setting.tokens,
        "frames": setting.frames,
        "held_out_clips": setting.num_held_out,
        "num_seeds": num_seeds,
    }


if __name__ == "__main__":
    sys.exit(main())
