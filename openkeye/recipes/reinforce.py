"""Reinforcement learning of one task by its own rewards.

    openkeye rl reinforce task=counting out_dir=my_model

Settings by path go further: `algorithm.objective=grpo`, `learner.trains=projector,decoder`, `max_age=2`, `num_workers=3`.
"""

from collections.abc import Mapping

from openkeye.common.checks import InputError
from openkeye.rl.run_config import Option, PostTrainingConfig, TaskConfig

RATE_AT_WIDTH_2048 = 1e-6
# usual for the 30B
NO_OPTIONS: Mapping[str, Option] = {}


def reinforce(
    task: str,
    options: Mapping[str, Option] = NO_OPTIONS,
    model_dir: str = "openkeye-tiny",
    out_dir: str = "reinforced",
    run_dir: str = "",
    num_steps: int = 100,
    rate: float = RATE_AT_WIDTH_2048,
    seed: int = 0,
) -> PostTrainingConfig:
    """One task, GSPO, in one process.

    Args:
        task: its name.
        options: of the task, as options.NAME=VALUE.
        run_dir: for journal, checkpoints and curves (default: out_dir with "-run" behind it).
        rate: of learning; narrow models take more.

    Raises:
        InputError: out_dir is the model that learning begins with.
    """
    if out_dir == model_dir:
        raise InputError(f"out_dir is {out_dir!r}, the model that learning begins with; give another folder")
    return PostTrainingConfig(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        tasks={task: TaskConfig(task, options=dict(options))},
        num_steps=num_steps,
        opens="openkeye.rl.policy_roles:open_roles",
        learner={"rate": rate},
        seed=seed,
    )
