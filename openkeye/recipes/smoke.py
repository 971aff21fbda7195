"""Every stage for a few steps, at a size for a CPU: for newcomers, and for tests of a change.

openkeye train smoke data=my_folder
"""

from dataclasses import replace

from openkeye.common.launch import num_ranks
from openkeye.data.config import SourceConfig
from openkeye.recipes import stages
from openkeye.train.config import RunConfig, StageConfig

GROUP = "smoke"


def smoke(
    data: str,
    model_dir: str = "openkeye-tiny",
    out_dir: str = "smoke",
    run_dir: str = "",
    num_steps: int = 2,
    context: int = 2048,
    max_clip_seconds: float = 15.0,
) -> RunConfig:
    """All stages of the report one after the other, a few steps each, on a folder of videos and questions.

    Stages, parts that train, attention and targets are those of `stages`; context, clip lengths and steps are small.

    Args:
        data: a folder as `finetune` takes it; every group of every mixture reads it.
        num_steps: of each stage.
        context: tokens of each stage.
    """
    shares = dict.fromkeys(stages.GROUPS, (GROUP,))

    def small(stage: StageConfig) -> StageConfig:
        return replace(
            stage,
            num_steps=num_steps,
            context=context,
            packs_per_step=num_ranks(),
            num_warmup_steps=0,
            max_clip_seconds=max_clip_seconds,
            video_tokens=None,
            mixture=(replace(stage.mixture[0], weight=1.0),),
        )

    every = (
        stages.stage_0,
        stages.stage_1,
        stages.stage_2,
        stages.stage_3,
        stages.warm_up_stage,
        stages.adaptation_stage,
        stages.sft_stage,
    )
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        sources={GROUP: SourceConfig("folder", data)},
        stages=tuple(small(make(shares, 1.0, context)) for make in every),
        log_every=1,
        metrics_every=1,
        num_workers=0,
    )
