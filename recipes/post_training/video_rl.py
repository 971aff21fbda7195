"""Video-RL (report, 5.6) at the size of openkeye-tiny: rule-checked questions about clips, vision and projector frozen, GSPO.

    openkeye rl recipes/post_training/video_rl.py out_dir=runs/video_rl/model seed=0 --stop-after-seconds 480
    bash recipes/post_training/video_rl.sh

The clips are those on which supervised training leaves room: of 1-5 minutes, and of 30-45 s with more events and distractors.
Localisation and counting are to rise; the other tasks are asked now and then, so that they do not fall.
"""

from collections.abc import Mapping
from dataclasses import replace

from openkeye.common.fields import unknown
from openkeye.rl.run_config import Option, PostTrainingConfig, TaskConfig
from recipes.post_training.domains import KINDS, RATE, engine_settings, task_of

RISING = ("localisation", "counting")
OTHER_WEIGHT = 0.25
# of every task that is only kept, for one of each that is to rise
FORMAT_WEIGHT = 0.1
MAX_TOKENS = 48
# of an answer; the longest true one has some 40


def video_rl(
    model_dir: str = "openkeye-tiny",
    run_dir: str = "runs/video_rl/run",
    out_dir: str = "runs/video_rl/model",
    clips: tuple[str, ...] = ("long", "story"),
    kinds: tuple[str, ...] = tuple(KINDS),
    options: Mapping[str, Option] = {},
    num_steps: int = 100,
    group_size: int = 8,
    groups_per_step: int = 16,
    rate: float = RATE,
    num_evaluated: int = 64,
    tokens_per_pack: int = 65_536,
    seed: int = 0,
) -> PostTrainingConfig:
    """All six tasks on the clips named, scored on unseen clips before the first step and after the last.

    Args:
        clips: of `domains.CLIPS`: long, story, hour, standard.
        kinds: of `domains.KINDS`.
        options: of all tasks, as options.NAME=VALUE.
        num_evaluated: unseen examples of each task that the run itself scores; 0: none.
        seed: of clips, sampling and order.

    Raises:
        InputError: clips or kinds that are unknown.
    """
    tasks: dict[str, TaskConfig] = {}
    unseen: dict[str, TaskConfig] = {}
    for name in clips:
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS)
            weight = 1.0 if kind in RISING else OTHER_WEIGHT
            tasks[f"{kind}_{name}"] = task_of(kind, "train", weight, {"seed": seed, **options}, name)
            unseen[f"unseen_{kind}_{name}"] = task_of(kind, "test", 1.0, options, name)
    return PostTrainingConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        tasks=tasks,
        num_steps=num_steps,
        opens="openkeye.rl.policy_roles:open_roles",
        group_size=group_size,
        groups_per_step=groups_per_step,
        oversampling=1.5,
        max_age=1,
        algorithm={"objective": "gspo", "reward_weights.format": FORMAT_WEIGHT},
        learner={"trains": "decoder", "rate": rate, "num_warmup_steps": 5, "tokens_per_pack": tokens_per_pack},
        engine=engine_settings(),
        max_tokens=MAX_TOKENS,
        evaluate_every=num_steps if num_evaluated else 0,
        evaluation_tasks=unseen if num_evaluated else {},
        num_evaluation_examples=max(1, num_evaluated),
        num_slots=2 * group_size * 4,
        save_every_steps=20,
        seed=seed,
    )


def smoke(run_dir: str = "runs/smoke", out_dir: str = "runs/smoke-model", num_steps: int = 1) -> PostTrainingConfig:
    """The same road in seconds on a CPU: the shortest clips, one task, two small groups."""
    config = video_rl(
        run_dir=run_dir, out_dir=out_dir, clips=("standard",), kinds=("counting",), options={"total_tokens": 320, "seed": 1},
        num_steps=num_steps, group_size=4, groups_per_step=1, num_evaluated=1, tokens_per_pack=2_048,
    )  # fmt: skip
    return replace(config, temperature=2.0, num_slots=4, has_tensorboard=False)
