"""Whole runs on a network of two layers, for tests: in this process or as real ranks.

In processes of their own: python -m tests.train.toy_runs JOBS (`command_of`).
"""

import json
import os
import pickle
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openkeye.data.config import LoaderConfig, Share, SourceConfig
from openkeye.data.document import Document, PixelPictures
from openkeye.data.loader import Loader, LoaderFigures
from openkeye.data.packed_batch import PackedBatch, pack
from openkeye.model.config import IndexerConfig, KeyeConfig, VisionConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import save_model
from openkeye.train.config import RunConfig, StageConfig
from openkeye.train.initialise import initialise
from openkeye.train.loop import Trainer
from openkeye.train.optimizer import Optimizer
from openkeye.train.reporter import SilentReporter
from openkeye.train.shard import Ranks
from tests.rank_processes import find_free_port, run_ranks

IMAGE = 7
# the token id of picture pads; prose may hold it too
VOCABULARY = 40
CPU = torch.device("cpu")
# where these runs are exact, also on a machine with a GPU

TOY = KeyeConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=VOCABULARY,
    rope_theta=10000.0,
    mrope_section=(2, 3, 3),
    indexer=IndexerConfig(2, 16, 6),
    vision=VisionConfig(16, 1, 2, 32, image_size=56),
    max_position_embeddings=512,
    image_token_id=IMAGE,
    video_token_id=8,
    dtype="float32",
    raw={},
)


@dataclass(frozen=True)
class ToyDocuments:
    """Documents by number: a run of counting tokens, of which the latter half is learnt; some begin with a picture."""

    num_samples: int | None = None
    longest: int = 24
    picture_every: int = 2
    # 0: none has one

    def read(self, index: int) -> Document:
        """See `Source.read`."""
        rng = np.random.default_rng([5, index])
        num_text = int(rng.integers(4, self.longest + 1))
        ids = (int(rng.integers(VOCABULARY)) + np.arange(num_text) * int(rng.integers(1, 4))) % VOCABULARY
        pictures: tuple[PixelPictures, ...] = ()
        num_media = 0
        if self.picture_every and index % self.picture_every == 0:
            shape = (1, 28, int(rng.choice([28, 56])), 3)
            pictures = (PixelPictures([rng.integers(0, 256, shape, dtype=np.uint8)]),)
            num_media = shape[2] // 28
        length = num_media + num_text
        is_media = torch.arange(length) < num_media
        return Document(
            name=f"toy:{index}",
            input_ids=torch.cat([torch.full((num_media,), IMAGE), torch.from_numpy(ids)]),
            position_ids=torch.arange(length).expand(3, -1).clone(),
            is_learnt=torch.arange(length) >= num_media + num_text // 2,
            is_media=is_media,
            pictures=pictures,
            task="seen" if num_media else "read",
        )


SOURCES = {"toy": ToyDocuments(), "text": ToyDocuments(picture_every=0)}


def toy_loader(loader: LoaderConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> Loader:
    """The loader of the documents above."""
    sources = {share.source: SOURCES[share.source] for share in loader.shares}
    return Loader(sources, loader, _unused, ranks.rank, ranks.size, state)


def _unused(sample: Any) -> Document:
    raise AssertionError("the toy sources hand out documents")


def toy_stage(name: str = "first", **changes: Any) -> StageConfig:
    """A stage of four steps of two packs."""
    stage = StageConfig(
        name,
        num_steps=4,
        context=32,
        mixture=(Share("toy"),),
        tokens_per_pack=64,
        packs_per_step=2,
        rate=3e-3,
        num_warmup_steps=1,
    )
    return replace(stage, **changes)


WARM_UP = {"trains": ("indexer",), "indexer_target": "dense", "answer_weight": 0.0}
ADAPTATION = {
    "trains": ("vision", "projector", "decoder", "indexer"), "attention": "sparse", "indexer_target": "selected",
    "balance_weight": 0.01,
}  # fmt: skip


def toy_run(folder: Path, *stages: StageConfig, **changes: Any) -> RunConfig:
    """A run in a folder that `write_toy_model` has written a model to."""
    config = RunConfig(
        model_dir=str(folder / "model"),
        run_dir=str(folder / "run"),
        out_dir=str(folder / "out"),
        sources={name: SourceConfig("toy") for name in SOURCES},
        stages=stages or (toy_stage(),),
        log_every=1,
        num_workers=0,
        metrics_every=2,
        weight_decay=0.1,
        save_every_seconds=1e6,
    )
    return replace(config, **changes)


def write_toy_model(folder: Path, config: KeyeConfig = TOY) -> Path:
    """A fresh model in `folder/model`, with a file that a finished model must have as well."""
    model = KeyeModel(config)
    initialise(model, seed=1)
    save_model(model, folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    return folder


def run_here(config: RunConfig, stop_after_seconds: float = float("inf")) -> SilentReporter:
    """The run in this process."""
    reporter = SilentReporter()
    Trainer(config, reporter, toy_loader, CPU).run(stop_after_seconds)
    return reporter


def log_of(config: RunConfig) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (Path(config.run_dir) / "log.jsonl").read_text().splitlines()]


@dataclass
class UnequalPacks:
    """A loader of four lanes whose packs differ in length, with pictures of two sizes in two of them and none in the others."""

    rank: int
    size: int
    num_steps: int = 0

    def __iter__(self) -> "UnequalPacks":
        return self

    def __next__(self) -> list[PackedBatch]:
        """This rank's packs of the next step."""
        first = 100 * self.num_steps
        self.num_steps += 1
        text, seen = ToyDocuments(picture_every=0, longest=48), ToyDocuments(picture_every=1)
        lanes = [
            [text.read(first)],
            [seen.read(first + number) for number in range(6)],
            [text.read(first + number) for number in range(7, 9)],
            [seen.read(first + number) for number in range(9, 12)],
        ]
        return [pack(lane) for lane in lanes[self.rank :: self.size]]

    def state(self) -> dict[str, Any]:
        """Never asked for in the middle of a stage."""
        raise AssertionError("runs of these packs end with their stage")

    def figures(self) -> LoaderFigures:
        """None worth telling."""
        return LoaderFigures(self.num_steps, 0, 0, 0, 1.0, {}, 0.0)

    def close(self) -> None:
        """Nothing is open."""


def unequal_loader(loader: LoaderConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> UnequalPacks:
    """The loader above, for stages of four packs a step."""
    assert loader.packs_per_step == 4 and state is None
    return UnequalPacks(ranks.rank, ranks.size)


def run_keeping_gradients(config: RunConfig) -> list[dict[str, torch.Tensor]]:
    """A run on the unequal packs: the whole gradients of every step, before clipping, by name."""
    kept = []
    step = Optimizer.step

    def keeping_step(self: Optimizer, rates: Mapping[str, float]) -> torch.Tensor:
        gradients = {}
        for one in self.parameters:
            gradient = one.parameter.grad
            assert gradient is not None, one.name
            gradients[one.name] = gradient.full_tensor().clone()
        kept.append(gradients)
        return step(self, rates)

    Optimizer.step = keeping_step  # type: ignore[method-assign]
    try:
        Trainer(config, SilentReporter(), unequal_loader, CPU).run()
    finally:
        Optimizer.step = step  # type: ignore[method-assign]
    return kept


@dataclass(frozen=True)
class Job:
    """A run over so many ranks."""

    config: RunConfig
    num_ranks: int = 1
    stop_after_seconds: float = float("inf")
    keeps_gradients: bool = False
    # `run_keeping_gradients`; each rank leaves them in a file beside `out_dir`

    def run(self) -> None:
        """As one rank."""
        if self.keeps_gradients:
            torch.save(run_keeping_gradients(self.config), f"{self.config.out_dir}.gradients.{os.environ.get('RANK', 0)}.pt")
            return
        reporter = SilentReporter()
        Trainer(self.config, reporter, toy_loader, CPU).run(self.stop_after_seconds)
        print("\n".join(reporter.lines), flush=True)


def command_of(folder: Path, *jobs: Job) -> list[str]:
    """What runs the jobs one after the other in processes of their own."""
    path = folder / f"{Path(jobs[0].config.run_dir).name}.jobs"
    path.write_bytes(pickle.dumps(jobs))
    return ["tests.train.toy_runs", str(path)]


def run_jobs(folder: Path, *jobs: Job) -> str:
    """All jobs; what they printed."""
    ((status, output, errors),) = run_ranks(1, *command_of(folder, *jobs))
    assert status == 0, errors
    return output


def main() -> None:
    torch.set_num_threads(1)
    for job in pickle.loads(Path(sys.argv[1]).read_bytes()):
        if job.num_ranks == 1:
            job.run()
            continue
        # Forked, because importing everything takes a rank longer than its run.
        ranks = [fork_rank(job, rank, free_port) for free_port in [find_free_port()] for rank in range(job.num_ranks)]
        failed = [rank for rank, pid in enumerate(ranks) if os.waitpid(pid, 0)[1]]
        assert not failed, f"ranks {failed} of {job.num_ranks} failed"


def fork_rank(job: Job, rank: int, port: int) -> int:
    """The process id of one rank, found by the others as torchrun's are."""
    pid = os.fork()
    if pid:
        return pid
    place = {"WORLD_SIZE": job.num_ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    status = 1
    try:
        job.run()
        status = 0
    finally:
        sys.stdout.flush()
        if status:
            traceback.print_exc()
        # gloo's threads, torn down beside those of other ranks, now and then end the process instead.
        os._exit(status)


if __name__ == "__main__":
    main()
