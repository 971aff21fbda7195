"""Where both text experiments begin: openkeye-tiny learns to answer as a task's reference solutions do, beside what it knows.

openkeye tasks arithmetic unsound_share=0.6 --num 40000 --references arithmetic.jsonl
openkeye train recipes/post_training/text_sft.py data.arithmetic=arithmetic.jsonl out_dir=start
"""

from collections.abc import Mapping

from openkeye.common.checks import InputError
from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig
from recipes.whole_story import SOURCES, WITH_INDEXER

OLD = ("pictures", "short")
# of what openkeye-tiny has learnt: pictures, clips of 8-30 s
ALIKE: Mapping[str, float] = {}


def text_sft(
    data: Mapping[str, str],
    weights: Mapping[str, float] = ALIKE,
    model_dir: str = "openkeye-tiny",
    run_dir: str = "runs/post_training/sft",
    out_dir: str = "runs/post_training/start",
    num_steps: int = 300,
    context: int = 4096,
    tokens_per_step: int = 32_768,
    old_weight: float = 0.1,
    rate: float = 1e-3,
    num_workers: int = 2,
    seed: int = 0,
) -> RunConfig:
    """Chats of reference solutions, with some of the clips and pictures of before.

    Args:
        data: JSON lines of `openkeye tasks --references`, by any names.
        weights: how often they come, by those names (default: 1 each).
        tokens_per_step: in packs of one context.
        old_weight: samples of the old data for one of the new; 0 leaves it out.
        rate: the peak.

    Raises:
        InputError: no data, weights of other names, or a step smaller than the context.
    """
    if not data:
        raise InputError("data is empty; give data.NAME=FILE, a file of `openkeye tasks NAME --references FILE`")
    if tokens_per_step < context:
        raise InputError(f"tokens_per_step is {tokens_per_step}; give at least the context, {context}")
    sources = {name: SourceConfig("chat_json_lines", path) for name, path in data.items()}
    if unknown := [name for name in weights if name not in data]:
        raise InputError(f"weights names {', '.join(unknown)}; data has {', '.join(data)}")
    total = sum(weights.get(name, 1.0) for name in data)
    mixture = tuple(Share(name, weights.get(name, 1.0) / total) for name in data)
    if old_weight:
        sources |= {name: SourceConfig(SOURCES[name].reader, options={**SOURCES[name].options, "seed": seed}) for name in OLD}
        mixture += tuple(Share(name, old_weight / len(OLD)) for name in OLD)
    stage = StageConfig(
        name="SFT",
        num_steps=num_steps,
        context=context,
        mixture=mixture,
        packs_per_step=tokens_per_step // context,
        trains=WITH_INDEXER,
        attention="sparse",
        indexer_target="selected",
        rates={"indexer": 2e-3},
        rate=rate,
        num_warmup_steps=min(20, num_steps // 10),
        balance_weight=0.01,
    )
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        sources=sources,
        stages=(stage,),
        seed=seed,
        optimizer="muon",
        indexer_optimizer="muon",
        num_workers=num_workers,
        save_every_seconds=60.0,
        metrics_every=100,
    )
