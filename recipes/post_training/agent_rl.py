"""Agent RL in simulated services: GSPO on training worlds, success in worlds that were never seen.

    bash recipes/post_training/agent_rl.sh

The start (`text_sft`) has learnt a few reference conversations of the training worlds in plain wording; RL begins where it
succeeds in a tenth to two fifths of the episodes.
"""

from dataclasses import replace

from openkeye.rl.run_config import PostTrainingConfig, TaskConfig
from recipes.post_training.context_rl import ROLES


def agent_rl(
    levels: tuple[int, ...] = (1, 2),
    seed: int = 0,
    model_dir: str = "runs/agent_rl/start",
    run_dir: str = "runs/agent_rl/run",
    out_dir: str = "runs/agent_rl/model",
    num_steps: int = 80,
    rate: float = 1e-4,
    evaluate_every: int = 20,
    num_evaluation_examples: int = 296,
) -> PostTrainingConfig:
    """One run of the experiment.

    Args:
        levels: of the task `api_calls`, equally often.
        seed: of episodes and sampling.
        evaluate_every: steps; in the held-out worlds, greedily.
        num_evaluation_examples: of each level; a multiple of 37 asks every held-out world equally often.
    """
    tasks = {f"level_{level}": TaskConfig("api_calls", options=_options(level, "train", seed + 1)) for level in levels}
    held_out = {f"held_out_{level}": TaskConfig("api_calls", options=_options(level, "held_out", 0)) for level in levels}
    return PostTrainingConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        tasks=tasks,
        evaluation_tasks=held_out,
        num_steps=num_steps,
        opens=ROLES,
        group_size=8,
        groups_per_step=16,
        oversampling=1.0,
        max_age=1,
        max_tokens=96,
        num_slots=128,
        learner={"rate": rate, "num_warmup_steps": 5, "tokens_per_pack": 16_384},
        episode={"max_turns": 4, "max_tokens": 512},
        evaluate_every=evaluate_every,
        num_evaluation_examples=num_evaluation_examples,
        seed=seed,
        save_every_steps=10,
        has_tensorboard=False,
    )


def smoke(
    model_dir: str = "openkeye-tiny",
    run_dir: str = "runs/agent_rl/smoke",
    out_dir: str = "runs/agent_rl/smoke-model",
    num_steps: int = 2,
) -> PostTrainingConfig:
    """The same on a CPU in seconds: small groups, short turns, hardly any evaluation."""
    config = agent_rl((1,), model_dir=model_dir, run_dir=run_dir, out_dir=out_dir, num_steps=num_steps)
    learner = {**config.learner, "tokens_per_pack": 4096}
    small = {"group_size": 4, "groups_per_step": 2, "num_slots": 12, "evaluate_every": num_steps, "num_evaluation_examples": 4}
    # The bundled model solves none of these, so that no group would be left.
    algorithm = {**config.algorithm, "drops_zero_variance": False}
    return replace(config, learner=learner, algorithm=algorithm, **small)


def _options(level: int, split: str, seed: int) -> dict[str, str | int | float | bool]:
    return {"level": level, "wording": "plain", "split": split, "seed": seed}
