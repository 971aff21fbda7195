"""Reinforcement learning of domains: each alone, which makes its teacher; all mixed; one after the other.

    openkeye rl recipes/post_training/teachers.py domain=reading out_dir=runs/mopd/teachers/reading
    openkeye rl recipes/post_training/teachers.py:mixed out_dir=runs/mopd/mixed

All begin with the same weights. One domain after the other is `teachers` from the weights of the one before (`mopd.sh`).
"""

from dataclasses import replace

from openkeye.rl.run_config import PostTrainingConfig, TaskConfig
from recipes.post_training.domains import RATE, TAUGHT, check_domains, engine_settings, task_of
from recipes.post_training.video_rl import FORMAT_WEIGHT

MAX_TOKENS = 160
# of an answer with its reasoning


def teachers(
    domain: str,
    model_dir: str = "openkeye-tiny",
    run_dir: str = "",
    out_dir: str = "runs/mopd/teacher",
    num_steps: int = 60,
    rate: float = RATE,
    groups_per_step: int = 12,
    seed: int = 0,
) -> PostTrainingConfig:
    """The teacher of one domain.

    Args:
        domain: of `domains.DOMAINS`.
        run_dir: default: out_dir with "-run" behind it.
    """
    return _run((domain,), model_dir, run_dir, out_dir, num_steps, rate, groups_per_step, seed)


def mixed(
    domains: tuple[str, ...] = TAUGHT,
    model_dir: str = "openkeye-tiny",
    run_dir: str = "",
    out_dir: str = "runs/mopd/mixed",
    num_steps: int = 0,
    rate: float = RATE,
    groups_per_step: int = 12,
    seed: int = 0,
) -> PostTrainingConfig:
    """One policy learns all domains at once, as many steps as all teachers together.

    Args:
        num_steps: default, 0: 60 for each domain.
    """
    return _run(domains, model_dir, run_dir, out_dir, num_steps or 60 * len(domains), rate, groups_per_step, seed)


def smoke(domain: str = "still_counting", run_dir: str = "runs/smoke", out_dir: str = "runs/smoke-model") -> PostTrainingConfig:
    """One step over small pictures."""
    config = teachers(domain, run_dir=run_dir, out_dir=out_dir, num_steps=1, groups_per_step=1)
    return replace(config, group_size=8, temperature=2.0, num_slots=8, max_tokens=24, has_tensorboard=False)


def _run(
    domains: tuple[str, ...],
    model_dir: str,
    run_dir: str,
    out_dir: str,
    num_steps: int,
    rate: float,
    groups_per_step: int,
    seed: int,
) -> PostTrainingConfig:
    tasks: dict[str, TaskConfig] = {name: task_of(name, "train", options={"seed": seed}) for name in check_domains(domains)}
    return PostTrainingConfig(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        tasks=tasks,
        num_steps=num_steps,
        opens="openkeye.rl.policy_roles:open_roles",
        group_size=8,
        groups_per_step=groups_per_step,
        oversampling=1.5,
        max_age=1,
        algorithm={"objective": "gspo", "reward_weights.format": FORMAT_WEIGHT},
        learner={"trains": "decoder", "rate": rate, "num_warmup_steps": 5, "tokens_per_pack": 65_536},
        engine=engine_settings(),
        max_tokens=MAX_TOKENS,
        num_slots=64,
        save_every_steps=20,
        seed=seed,
    )
