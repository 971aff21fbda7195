"""Fine-tune a model on your own folder of videos and questions.

    openkeye train finetune data=my_folder out_dir=my_model

`openkeye.data.sources.folder.Folder` tells how the folder may look.
"""

import math
from collections.abc import Sequence
from typing import Any

from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks
from openkeye.data.config import Share, SourceConfig
from openkeye.data.sample import Sample
from openkeye.data.sources.folder import Folder
from openkeye.inputs.encode import lay_out
from openkeye.inputs.processor import Processor, read_json, resolve_model_dir
from openkeye.train.config import RunConfig, StageConfig

RATE_AT_WIDTH_2048 = 2e-5
# The peak goes with 1 / width squared: usual for the 30B, and what the bundled model (width 256) learns a new manner of
# speaking from ten clips with; 1.6e-4 was far too slow for it.
MIN_STEPS = 60
# A handful of clips needs more than a few looks at each.
CONTEXT_GRID = 256
MAX_MEASURED = 256
# samples whose tokens are counted; of more, an even choice, and half as much room again
FILL = 0.85
# of a pack that packing reaches with few samples
END_TOKENS = 8
# the most that a template writes around the end of a turn
MAX_PACKS = 16
SAMPLES_PER_PACK = 100
# One more pack a step for each so many samples.


def finetune(
    data: str,
    model_dir: str = "openkeye-tiny",
    out_dir: str = "finetuned",
    run_dir: str = "",
    num_epochs: float = 3.0,
    min_steps: int = MIN_STEPS,
    rate: float | None = None,
    trains: tuple[str, ...] = (),
    held_out_share: float = 0.1,
    fps: float = 0.0,
    seed: int = 0,
) -> RunConfig:
    """Every video with all its questions, shuffled, num_epochs times.

    A model that attends sparsely is tuned so, and its indexer learns along. Some videos are held out and answered before and
    after; `held_out_share=0` learns them all.

    Args:
        data: the folder.
        run_dir: for checkpoints and curves (default: out_dir with "-run" behind it).
        min_steps: the least number of steps, however few the samples.
        rate: the peak (default: 2e-5 at a width of 2,048, more for narrower models).
        trains: of vision, projector, decoder and indexer (default: all but vision).
        fps: sampled frames per second (default, 0: the checkpoint's).

    Raises:
        InputError: a folder without usable questions, videos that cannot be read or do not fit the model's context.
    """
    if out_dir == model_dir:
        raise InputError(f"out_dir is {out_dir!r}, the model that training begins with; give another folder")
    train, held_out = (
        Folder(data, part=part, held_out_share=held_out_share, seed=seed, fps=fps) for part in ("train", "held_out")
    )
    lengths, is_every = _token_counts(train, Processor.load(model_dir))
    config = read_json(resolve_model_dir(model_dir) / "config.json")
    context = _context(lengths, is_every, config, data)
    packs = _packs_per_step(train.num_samples)
    num_tokens = train.num_samples * sum(lengths) / len(lengths)
    is_sparse = bool(config.get("sa_config"))
    num_steps = max(min_steps, math.ceil(num_epochs * num_tokens / (packs * context * FILL)))
    stage = StageConfig(
        name="finetune",
        num_steps=num_steps,
        context=context,
        mixture=(Share("folder"),),
        packs_per_step=packs,
        trains=trains or ("projector", "decoder", *(["indexer"] if is_sparse else [])),
        attention="sparse" if is_sparse else "dense",
        indexer_target="selected" if is_sparse and "indexer" in (trains or ("indexer",)) else "none",
        rate=RATE_AT_WIDTH_2048 * (2048 / config["hidden_size"]) ** 2 if rate is None else rate,
        num_warmup_steps=min(20, num_steps // 10),
    )
    options = {"held_out_share": held_out_share, "seed": seed, "fps": fps}
    sources = {"folder": SourceConfig("folder", data, {"part": "train", **options})}
    if held_out.num_samples:
        sources["held_out"] = SourceConfig("folder", data, {"part": "held_out", **options})
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        sources=sources,
        stages=(stage,),
        seed=seed,
        log_every=max(1, min(10, num_steps // 20)),
        weight_decay=0.0,
        evaluates=("held_out",) if held_out.num_samples else (),
    )


def _token_counts(source: Folder, processor: Processor) -> tuple[list[int], bool]:
    """(tokens of samples, whether all were counted); videos are scanned for it and not decoded."""
    step = max(1, math.ceil(source.num_samples / MAX_MEASURED))
    return [num_tokens(source.read(index), processor) for index in range(0, source.num_samples, step)], step == 1


def num_tokens(sample: Sample, processor: Processor) -> int:
    """Tokens of a sample, or a few more: what a template writes before a first turn is taken for the end of the turn before it.

    Raises:
        InputError: a video or picture that cannot be read; names the sample.
    """
    limits = processor.video_limits.changed(fps=sample.video_options.get("fps"))
    try:
        trunk = lay_out(sample.messages, processor, limits, add_generation_prompt=False).num_tokens
        branches = [lay_out(branch, processor, add_generation_prompt=False).num_tokens for branch in sample.branches]
        bare = lay_out([{"role": "user", "content": ""}], processor, add_generation_prompt=False).num_tokens
    except InputError as error:
        raise InputError(f"{sample.name}: {error}") from error
    return trunk + sum(branches) - (len(branches) - 1) * (bare - END_TOKENS) if branches else trunk


def _context(lengths: Sequence[int], is_every: bool, config: dict[str, Any], data: str) -> int:
    """Room for the longest sample."""
    longest = max(lengths) if is_every else math.ceil(1.5 * max(lengths))
    limit = config.get("max_position_embeddings") or longest
    if max(lengths) > limit:
        raise InputError(
            f"{data}: the longest video with its questions has {max(lengths):,} tokens, and the model reads {limit:,}; "
            "give fps=1 or less, or cut the video"
        )
    return min(math.ceil(longest / CONTEXT_GRID) * CONTEXT_GRID, limit)


def _packs_per_step(num_samples: int) -> int:
    """More for more samples, and as many for every rank."""
    packs = min(MAX_PACKS, max(1, round(num_samples / SAMPLES_PER_PACK)))
    return math.ceil(packs / num_ranks()) * num_ranks()
