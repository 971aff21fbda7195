"""Learning rates over a stage: a linear warm-up, then a cosine down to a share of the peak."""

import math

from openkeye.train.config import StageConfig


def rate_share(stage: StageConfig, step: int) -> float:
    """Share of the peak rate at a step of the stage, counted from 0; the last step is at `rate_end_share`."""
    if step < stage.num_warmup_steps:
        return (step + 1) / stage.num_warmup_steps
    length = stage.num_steps - 1 - stage.num_warmup_steps
    progress = (step - stage.num_warmup_steps) / length if length > 0 else 1.0
    return stage.rate_end_share + (1 - stage.rate_end_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def rates_at(stage: StageConfig, step: int) -> dict[str, float]:
    """The rate of every part that trains."""
    share = rate_share(stage, step)
    return {part: share * stage.rates.get(part, stage.rate) for part in stage.trains}
