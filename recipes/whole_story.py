"""The report's road at the size of openkeye-tiny: stages 0-3 with a growing context, indexer warm-up, sparse adaptation, SFT.

    bash recipes/whole_story.sh

The trunk's weights are taken over from earlier training (`recipes/tiny.py` makes such weights from nothing), the indexer begins
anew. The report's projector does too; `fresh=projector,indexer` does that here, and it needs more steps. Two runs, so that the
dense model between them can be looked at: `pretraining` (stages 0-3) and `sparse` (warm-up, adaptation, an hour, SFT). Before
them `python -m recipes.whole_story FROM TO` copies the model that the road begins with and gives it positions for an hour.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from openkeye.data.config import Share, SourceConfig
from openkeye.inputs.processor import resolve_model_dir
from openkeye.train.config import RunConfig, StageConfig

ALL = ("vision", "projector", "decoder")
WITH_INDEXER = (*ALL, "indexer")
NUM_POSITIONS = 262_144
VIDEO_TOKENS = 131_072
# of the model that comes out: every frame of an hour at 2 a second, and room for questions
HOUR_CONTEXT = 131_072
# room for 5,600 frames of 22-23 tokens and their questions: three quarters of an hour, as much as one GPU learns from at once

SOURCES = {
    "captions": SourceConfig("frameforge_captions", options={"max_start_seconds": 3600.0}),
    "pictures": SourceConfig("frameforge_pictures", options={"max_pictures": 3, "max_side": 112}),
    "text": SourceConfig("frameforge_text"),
    # 8-30 s
    "short": SourceConfig("frameforge_videos", options={"frames": "16..60", "max_rounds": 1, "max_start_seconds": 3600.0}),
    # 30 s - 5 min
    "minutes": SourceConfig(
        "frameforge_videos", options={"frames": "61..600", "max_rounds": 4, "sparse_share": 0.1, "max_start_seconds": 3600.0}
    ),
    # 5 - 20 min
    "long": SourceConfig(
        "frameforge_videos", options={"frames": "601..2400", "max_rounds": 6, "sparse_share": 0.6, "max_start_seconds": 2400.0}
    ),
    # 20 - 46 min
    "hour": SourceConfig(
        "frameforge_videos", options={"frames": "2401..5500", "max_rounds": 6, "sparse_share": 0.8, "max_start_seconds": 0.0}
    ),
}


def widen(model_dir: str, out_dir: str) -> None:
    """A model folder with room for an hour: the same weights, more positions and a larger budget for videos."""
    out = Path(out_dir)
    shutil.copytree(resolve_model_dir(model_dir), out, dirs_exist_ok=True)
    config, preprocessor = (json.loads((out / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    config["max_position_embeddings"] = NUM_POSITIONS
    preprocessor["video"]["total_tokens"] = VIDEO_TOKENS
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def pretraining(
    model_dir: str = "runs/whole_story/start",
    run_dir: str = "runs/whole_story/dense",
    out_dir: str = "runs/whole_story/dense-model",
    scale: float = 1.0,
    num_workers: int = 14,
    seed: int = 0,
) -> RunConfig:
    """Stages 0-3 (report, pre-training), dense: the projector alone, then everything, at contexts of 4K, 8K, 16K and 64K.

    Args:
        model_dir: whose vision tower and language model are taken over.
        scale: of the numbers of steps; the recipe's figures are those of 1.
    """
    stages = (
        StageConfig(
            "0: projector",
            steps(60, scale),
            context=4_096,
            tokens_per_pack=40_960,
            mixture=(Share("captions"), Share("pictures", 3.0), Share("short", 2.0)),
            trains=("projector",),
            rate=1e-3,
            num_warmup_steps=steps(10, scale),
        ),
        StageConfig(
            "1: everything",
            steps(150, scale),
            context=8_192,
            tokens_per_pack=49_152,
            mixture=(Share("captions", 4.0, 2.0), Share("pictures", 4.0, 2.0), Share("text", 3.0), Share("short", 8.0, 16.0)),
            trains=ALL,
            rate=5e-4,
            rate_end_share=0.7,
            num_warmup_steps=steps(20, scale),
            balance_weight=0.01,
        ),
        StageConfig(
            "2: minutes",
            steps(300, scale),
            context=16_384,
            tokens_per_pack=49_152,
            mixture=(Share("captions"), Share("pictures"), Share("text"), Share("short", 8.0, 6.0), Share("minutes", 4.0, 8.0)),
            trains=ALL,
            rate=4e-4,
            rate_end_share=0.7,
            num_warmup_steps=steps(20, scale),
            balance_weight=0.01,
        ),
        StageConfig(
            "3: long",
            steps(130, scale),
            context=65_536,
            tokens_per_pack=65_536,
            # Long to short about one to one in tokens: a clip of 5-20 minutes has some 27,000, one of 8-30 s some 1,200.
            mixture=(
                Share("captions", 0.5),
                Share("text", 0.5),
                Share("short", 6.0),
                Share("minutes", 4.0),
                Share("long", 1.2),
            ),
            trains=ALL,
            rate=3e-4,
            rate_end_share=0.5,
            num_warmup_steps=steps(10, scale),
            balance_weight=0.01,
        ),
    )
    return run_config(model_dir, run_dir, out_dir, stages, num_workers, seed, fresh=("indexer",))


def sparse(
    model_dir: str = "runs/whole_story/dense-model",
    run_dir: str = "runs/whole_story/sparse",
    out_dir: str = "runs/whole_story/model",
    scale: float = 1.0,
    num_workers: int = 14,
    seed: int = 1,
) -> RunConfig:
    """Indexer warm-up, sparse adaptation up to an hour, SFT with the rate going to zero (report, DSA training and SFT)."""
    adapted = (Share("captions", 0.5), Share("text", 0.5), Share("short", 8.0), Share("minutes", 6.0), Share("long", 0.6))
    stages = (
        StageConfig(
            "indexer warm-up",
            steps(300, scale),
            context=16_384,
            tokens_per_pack=49_152,
            mixture=(Share("short", 4.0), Share("minutes", 6.0)),
            trains=("indexer",),
            indexer_target="dense",
            answer_weight=0.0,
            rate=2e-2,
            rate_end_share=0.1,
            num_warmup_steps=steps(10, scale),
        ),
        StageConfig(
            "sparse adaptation",
            steps(450, scale),
            context=65_536,
            tokens_per_pack=65_536,
            mixture=adapted,
            trains=WITH_INDEXER,
            attention="sparse",
            indexer_target="selected",
            rates={"indexer": 3e-3},
            rate=5e-4,
            rate_end_share=0.5,
            num_warmup_steps=steps(20, scale),
            balance_weight=0.01,
        ),
        StageConfig(
            "an hour",
            steps(12, scale),
            context=HOUR_CONTEXT,
            tokens_per_pack=HOUR_CONTEXT,
            mixture=(Share("short", 6.0), Share("minutes", 5.0), Share("long", 1.0), Share("hour", 1.0)),
            trains=WITH_INDEXER,
            attention="sparse",
            indexer_target="selected",
            rates={"indexer": 2e-3},
            rate=4e-4,
            rate_end_share=0.8,
            balance_weight=0.01,
        ),
        StageConfig(
            "SFT",
            steps(250, scale),
            context=65_536,
            tokens_per_pack=65_536,
            mixture=(Share("pictures", 0.5), Share("short", 12.0), Share("minutes", 6.0), Share("long", 0.5)),
            trains=WITH_INDEXER,
            attention="sparse",
            indexer_target="selected",
            rates={"indexer": 2e-3},
            rate=4e-4,
            rate_end_share=0.0,
            balance_weight=0.01,
        ),
    )
    return run_config(model_dir, run_dir, out_dir, stages, num_workers, seed)


def smoke(
    model_dir: str = "openkeye-tiny", run_dir: str = "runs/smoke", out_dir: str = "runs/smoke-model", num_steps: int = 2
) -> RunConfig:
    """Every stage of both runs for a few steps on short clips: the same road on a CPU, in a minute."""
    stages = (*pretraining().stages, *sparse().stages)
    short = tuple(
        replace(
            stage,
            num_steps=num_steps,
            num_warmup_steps=0,
            context=2_048,
            tokens_per_pack=2_048,
            mixture=tuple(share for share in stage.mixture if share.source in ("captions", "pictures", "text", "short")),
        )
        for stage in stages
    )
    return replace(run_config(model_dir, run_dir, out_dir, short, 0, 0, fresh=("projector", "indexer")), log_every=1)


def run_config(
    model_dir: str,
    run_dir: str,
    out_dir: str,
    stages: tuple[StageConfig, ...],
    num_workers: int,
    seed: int,
    fresh: tuple[str, ...] = (),
    sources: Mapping[str, SourceConfig] = SOURCES,
) -> RunConfig:
    """What both runs share. Each source draws from the run's own seed, so that no clip comes twice."""
    seeded = {name: replace(source, options={**source.options, "seed": seed}) for name, source in sources.items()}
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        sources=seeded,
        stages=stages,
        seed=seed,
        fresh=fresh,
        optimizer="muon",
        indexer_optimizer="muon",
        clip=1.0,
        num_workers=num_workers,
        save_every_seconds=120.0,
        log_every=10,
        metrics_every=25,
    )


def steps(number: int, scale: float) -> int:
    """A scaled number of steps, at least one."""
    return max(1, round(number * scale))


if __name__ == "__main__":
    widen(*sys.argv[1:])
