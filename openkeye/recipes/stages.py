"""The report's stages for a model of the 30B shape: pre-training 0 to 3, indexer warm-up, sparse adaptation, SFT.

    openkeye train stages model_dir=keye-30b-init run_dir=runs/pretrain out_dir=keye-dense \\
        data.captions=web_dataset:/data/captions data.video=chat_json_lines:/data/clips.jsonl data.long=... scale=1e-3
    openkeye train stages:warm_up model_dir=keye-dense run_dir=runs/warm-up out_dir=keye-indexed data.video=... data.text=...
    openkeye train stages:adaptation model_dir=keye-indexed ...
    openkeye train stages:sft model_dir=keye-sparse ...

Token counts are the report's times `scale`. The report tells no learning rates, batch sizes and weights of the mixture: those
here are ours where no source stands beside them.
"""

import math
from collections.abc import Mapping

from openkeye.common.checks import InputError
from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig

GROUPS = ("captions", "interleaved", "video", "text", "ocr", "knowledge", "grounding", "long", "sft")
# knowledge: maths, STEM, GUI and question answering; grounding: boxes, counting and times; long: hour-long video, long and many
# documents, long code and agent trajectories

K = 1024
PROJECTOR_RATE = 1e-3
VISION_SHARE = 0.2
# of the decoder's rate: the tower comes trained
WARM_UP_RATE = 1e-3
ADAPTATION_RATE = 7.3e-6
# DeepSeek-V3.2, arXiv 2512.02556

Data = Mapping[str, tuple[str, ...]]
# group -> its sources, each "READER:PATH" (`openkeye.data.sources`)


def stages(
    model_dir: str,
    data: Data,
    run_dir: str,
    out_dir: str,
    scale: float = 1.0,
    tokens_per_step: int = 4 * K * K,
) -> RunConfig:
    """Stages 0 to 3 (report, section 3): projector at 8K, then everything at 32K, 64K and 256K, attention dense.

    Args:
        data: sources of the groups in GROUPS; a stage takes those of its own groups that are given.
        scale: of the report's token counts.

    Raises:
        InputError: an unknown group, or a stage without any.
    """
    sources, shares = open_groups(data)
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        sources=sources,
        stages=(
            stage_0(shares, scale, tokens_per_step),
            stage_1(shares, scale, tokens_per_step),
            stage_2(shares, scale, tokens_per_step),
            stage_3(shares, scale, tokens_per_step),
        ),
        fresh=("projector",),
        recomputes=True,
        compiles=True,
        weight_decay=0.1,
    )


def warm_up(
    model_dir: str, data: Data, run_dir: str, out_dir: str, scale: float = 1.0, tokens_per_step: int = 2 * K * K
) -> RunConfig:
    """The indexer learns dense attention's distribution; nothing else changes (report, section 2; 2B tokens)."""
    sources, shares = open_groups(data)
    stage = warm_up_stage(shares, scale, tokens_per_step)
    return RunConfig(model_dir, run_dir, out_dir, sources, (stage,), fresh=("indexer",), weight_decay=0.0)


def adaptation(
    model_dir: str, data: Data, run_dir: str, out_dir: str, scale: float = 1.0, tokens_per_step: int = 4 * K * K
) -> RunConfig:
    """Everything learns under sparse attention, the indexer from its own loss (report, section 2)."""
    sources, shares = open_groups(data)
    stage = adaptation_stage(shares, scale, tokens_per_step)
    return RunConfig(model_dir, run_dir, out_dir, sources, (stage,), recomputes=True, weight_decay=0.1)


def sft(
    model_dir: str, data: Data, run_dir: str, out_dir: str, scale: float = 1.0, tokens_per_step: int = 2 * K * K
) -> RunConfig:
    """Supervised fine-tuning on chats, sparse from the first step."""
    sources, shares = open_groups(data)
    stage = sft_stage(shares, scale, tokens_per_step)
    return RunConfig(model_dir, run_dir, out_dir, sources, (stage,), recomputes=True)


def open_groups(data: Data) -> tuple[dict[str, SourceConfig], dict[str, tuple[str, ...]]]:
    """(sources by name, the names of each group's sources).

    Raises:
        InputError: a group that is not in GROUPS, or a source that is not READER:PATH.
    """
    sources: dict[str, SourceConfig] = {}
    names: dict[str, tuple[str, ...]] = {}
    for group, words in data.items():
        if group not in GROUPS:
            raise InputError(f"data.{group}: no such group; choose from {', '.join(GROUPS)}")
        for number, word in enumerate(words):
            reader, has_path, path = word.partition(":")
            if not has_path or not reader or not path:
                raise InputError(f"data.{group}={word}: expected READER:PATH, for example folder:/videos")
            name = f"{group}-{number}" if len(words) > 1 else group
            sources[name] = SourceConfig(reader, path)
            names[group] = (*names.get(group, ()), name)
    return sources, names


def mixture(stage: str, shares: Mapping[str, tuple[str, ...]], weights: Mapping[str, float]) -> tuple[Share, ...]:
    """Weights of groups as shares of their sources; groups that nobody gave are left out.

    Raises:
        InputError: none of them was given.
    """
    found = tuple(
        Share(name, weight / len(shares[group])) for group, weight in weights.items() for name in shares.get(group, ())
    )
    if not found:
        raise InputError(f"{stage} has no data; give at least one of {', '.join(f'data.{group}' for group in weights)}")
    return found


def stage_0(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """4B tokens at 8K: the projector alone, on captions and interleaved pictures and text."""
    return StageConfig(
        name="stage-0",
        num_steps=num_steps(4e9 * scale, tokens_per_step),
        context=8 * K,
        mixture=mixture("stage-0", shares, {"captions": 3, "interleaved": 1}),
        packs_per_step=packs(tokens_per_step, 8 * K),
        trains=("projector",),
        rate=PROJECTOR_RATE,
        num_warmup_steps=min(100, num_steps(4e9 * scale, tokens_per_step) // 10),
        max_clip_seconds=15.0,
    )


def stage_1(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """About 1T tokens at 32K, clips to 15 s, 24K video tokens."""
    weights = {"captions": 3, "interleaved": 2, "video": 2, "text": 2, "ocr": 1}
    return _everything(
        "stage-1", 1e12 * scale, tokens_per_step, 32 * K, mixture("stage-1", shares, weights), 5e-5, 15.0, 24 * K
    )


def stage_2(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """About 2T tokens at 64K, clips to 15 min, 64K video tokens (what of a sample is left for text is cut from them)."""
    weights = {"captions": 2, "video": 3, "text": 3, "ocr": 2, "knowledge": 3, "grounding": 2}
    room = 64 * K - 4 * K
    return _everything(
        "stage-2", 2e12 * scale, tokens_per_step, 64 * K, mixture("stage-2", shares, weights), 3e-5, 15 * 60.0, room
    )


def stage_3(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """500B tokens at 256K, clips to 2 h, 180K video tokens, long to short 1 : 1."""
    weights = {"video": 3.0, "text": 3.0, "ocr": 1.0, "knowledge": 3.0, "grounding": 2.0}
    given = sum(weight for group, weight in weights.items() if group in shares)
    weights["long"] = given or 1.0
    return _everything(
        "stage-3", 5e11 * scale, tokens_per_step, 256 * K, mixture("stage-3", shares, weights), 2e-5, 2 * 3600.0, 180 * K
    )


def warm_up_stage(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """2B tokens at 128K: 1,000 steps of 16 sequences at 1e-3 (DeepSeek-V3.2)."""
    weights = {"video": 2, "text": 1, "long": 2, "interleaved": 1}
    return StageConfig(
        name="warm-up",
        num_steps=num_steps(2.1e9 * scale, tokens_per_step),
        context=128 * K,
        mixture=mixture("warm-up", shares, weights),
        packs_per_step=packs(tokens_per_step, 128 * K),
        trains=("indexer",),
        attention="dense",
        indexer_target="dense",
        rate=WARM_UP_RATE,
        rate_end_share=1.0,
        num_warmup_steps=num_steps(2.1e9 * scale, tokens_per_step) // 50,
        answer_weight=0.0,
        max_clip_seconds=2 * 3600.0,
        video_tokens=100 * K,
    )


def adaptation_stage(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """20B tokens at 128K (GLM-5; DeepSeek-V3.2 took 944B, the report does not say), 7.3e-6 (DeepSeek-V3.2)."""
    weights = {"video": 2, "text": 2, "long": 3, "knowledge": 1, "interleaved": 1}
    return StageConfig(
        name="adaptation",
        num_steps=num_steps(20e9 * scale, tokens_per_step),
        context=128 * K,
        mixture=mixture("adaptation", shares, weights),
        packs_per_step=packs(tokens_per_step, 128 * K),
        trains=("vision", "projector", "decoder", "indexer"),
        attention="sparse",
        indexer_target="selected",
        emulates_e4m3=True,
        rate=ADAPTATION_RATE,
        rate_end_share=1.0,
        num_warmup_steps=num_steps(20e9 * scale, tokens_per_step) // 50,
        balance_weight=1e-3,
        max_clip_seconds=2 * 3600.0,
        video_tokens=100 * K,
    )


def sft_stage(shares: Mapping[str, tuple[str, ...]], scale: float, tokens_per_step: int) -> StageConfig:
    """2B tokens of chats at 128K; the report's count is not public."""
    return StageConfig(
        name="sft",
        num_steps=num_steps(2e9 * scale, tokens_per_step),
        context=128 * K,
        mixture=mixture("sft", shares, {"sft": 1}),
        packs_per_step=packs(tokens_per_step, 128 * K),
        trains=("vision", "projector", "decoder", "indexer"),
        attention="sparse",
        indexer_target="selected",
        rates={"vision": 2e-6},
        rate=1e-5,
        num_warmup_steps=num_steps(2e9 * scale, tokens_per_step) // 30,
        balance_weight=1e-3,
        max_clip_seconds=2 * 3600.0,
        video_tokens=100 * K,
    )


def _everything(
    name: str,
    num_tokens: float,
    tokens_per_step: int,
    context: int,
    shares: tuple[Share, ...],
    rate: float,
    clip_seconds: float,
    video_tokens: int,
) -> StageConfig:
    """A stage in which all parts but the indexer train, densely."""
    count = num_steps(num_tokens, tokens_per_step)
    return StageConfig(
        name=name,
        num_steps=count,
        context=context,
        mixture=shares,
        packs_per_step=packs(tokens_per_step, context),
        trains=("vision", "projector", "decoder"),
        rates={"vision": VISION_SHARE * rate},
        rate=rate,
        num_warmup_steps=min(2000, count // 20),
        balance_weight=1e-3,
        max_clip_seconds=clip_seconds,
        video_tokens=video_tokens,
    )


def num_steps(num_tokens: float, tokens_per_step: int) -> int:
    """Steps that see at least so many tokens."""
    return max(1, math.ceil(num_tokens / tokens_per_step))


def packs(tokens_per_step: int, context: int) -> int:
    """Packs of one context each in a step."""
    return max(1, tokens_per_step // context)
