"""What is wrong with a run before its first step, each in one line with the mend."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError, writing_to
from openkeye.model.config import KeyeConfig
from openkeye.train.config import RunConfig, StageConfig

SETTINGS_FILE = "settings.json"
MAY_CHANGE = {
    "run_dir", "out_dir", "num_shards", "recomputes", "compiles", "num_workers", "max_bad_share", "save_every_seconds",
    "log_every", "metrics_every", "has_tensorboard", "evaluates",
}  # fmt: skip
# between two starts of a run: where it lies, how it is computed and told of


def check_run(config: RunConfig, model_config: KeyeConfig, num_ranks: int) -> list[str]:
    """What the settings alone cannot know.

    Returns:
        lines that people should read before the run begins.

    Raises:
        InputError: a stage does not fit the model or the ranks.
    """
    if config.num_shards and num_ranks % config.num_shards:
        raise InputError(
            f"num_shards {config.num_shards} does not divide {num_ranks} ranks; give a divisor of {num_ranks}, or 0 for all"
        )
    notices = []
    is_indexer_taught = "indexer" not in config.fresh
    for stage in config.stages:
        _check_stage(stage, model_config, num_ranks)
        if stage.attention == "sparse" and not is_indexer_taught:
            notices.append(
                f"stage {stage.name!r} attends where a fresh indexer points that no stage before has trained: a warm-up "
                "(attention 'dense', trains ('indexer',), indexer_target 'dense') before it teaches it first"
            )
        is_indexer_taught = is_indexer_taught or "indexer" in stage.trains
    return notices


def _check_stage(stage: StageConfig, model_config: KeyeConfig, num_ranks: int) -> None:
    where = f"stage {stage.name!r}"
    limit = model_config.max_position_embeddings
    if stage.context > limit:
        raise InputError(f"{where}: context {stage.context} exceeds the model's {limit} positions; give at most {limit}")
    if stage.packs_per_step % num_ranks:
        more = -(-stage.packs_per_step // num_ranks) * num_ranks
        raise InputError(
            f"{where}: {stage.packs_per_step} packs a step do not divide among {num_ranks} ranks; set packs_per_step to a "
            f"multiple, such as {more}"
        )
    if model_config.vision is None and (blind := [part for part in ("vision", "projector") if part in stage.trains]):
        raise InputError(f"{where}: trains names {', '.join(blind)}, and the model has no vision tower; take them out")


def check_run_dir(config: RunConfig) -> None:
    """Whether `run_dir` is free or this run's own.

    Raises:
        InputError: it holds another run; the fields that differ are named.
    """
    path = Path(config.run_dir) / SETTINGS_FILE
    if not path.is_file():
        return
    saved, own = json.loads(path.read_text()), _as_json(config)
    differing = [name for name in own if name not in MAY_CHANGE and saved.get(name) != own[name]]
    if not differing:
        return
    told = []
    for name in differing:
        if name == "stages":
            told += _differing_stages(saved.get(name, []), own[name])
        else:
            told.append(f"{name} was {saved.get(name)!r} and is {own[name]!r}")
    raise InputError(f"{config.run_dir} belongs to a run with other settings ({'; '.join(told)}); give another run_dir")


def _differing_stages(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[str]:
    names, own_names = ([stage["name"] for stage in stages] for stages in (saved, own))
    if names != own_names:
        return [f"stages were {', '.join(names)} and are {', '.join(own_names)}"]
    return [
        f"{field} of stage {new['name']!r} was {old.get(field)!r} and is {new[field]!r}"
        for old, new in zip(saved, own, strict=True)
        for field in new
        if old.get(field) != new[field]
    ]


def claim_run_dir(config: RunConfig) -> None:
    """Write the settings down, so that a later start knows whose folder it is.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(config.run_dir)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{SETTINGS_FILE}.unfinished"
        unfinished.write_text(json.dumps(_as_json(config), indent=1) + "\n")
        os.replace(unfinished, folder / SETTINGS_FILE)


def _as_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))
