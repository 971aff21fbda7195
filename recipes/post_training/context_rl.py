"""Context-RL against outcome-only RL, on generated arithmetic whose answers can often be guessed.

    bash recipes/post_training/context_rl.sh

The start (`text_sft`) has learnt references of which a share has the right answer behind a wrong step, or behind a bare claim.
Then GSPO by `reward=outcome` or `reward=context` (outcome times process), failed groups asked again or not; three seeds each.
"""

from collections.abc import Mapping
from dataclasses import replace

from openkeye.common.checks import InputError
from openkeye.rl.run_config import Option, PostTrainingConfig, TaskConfig

REWARDS = ("outcome", "context")
MAX_NUMBER = 15
# in questions
ROLES = "openkeye.rl.policy_roles:open_roles"


def context_rl(
    reward: str = "outcome",
    recovers: bool = False,
    trained_on: str = "bare",
    seed: int = 0,
    model_dir: str = "runs/context_rl/start",
    run_dir: str = "runs/context_rl/run",
    out_dir: str = "runs/context_rl/model",
    num_steps: int = 60,
    rate: float = 1e-4,
    evaluate_every: int = 20,
    num_evaluation_examples: int = 300,
) -> PostTrainingConfig:
    """One run of the experiment.

    Args:
        reward: of REWARDS: what is learnt by. Both are always logged.
        recovers: groups in which every rollout failed by that reward are asked again with a mistake report.
        trained_on: "bare" or "report": the prompt on which what succeeds then is learnt.
        seed: of questions and sampling.
        evaluate_every: steps; on the held-out split, greedily.

    Raises:
        InputError: another reward.
    """
    if reward not in REWARDS:
        raise InputError(f"reward is {reward!r}; give one of {', '.join(REWARDS)}")
    recovery: Mapping[str, Option] = {"is_on": True, "reward": reward, "trained_on": trained_on, "shows_attempt": False}
    return PostTrainingConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        tasks={"arithmetic": TaskConfig("arithmetic", options={"seed": seed + 1, "max_number": MAX_NUMBER})},
        evaluation_tasks={"held_out": TaskConfig("arithmetic", options={"split": "test", "max_number": MAX_NUMBER})},
        num_steps=num_steps,
        opens=ROLES,
        group_size=8,
        groups_per_step=16,
        oversampling=1.0,
        max_age=1,
        max_tokens=96,
        num_slots=128,
        algorithm={"reward_weights": "", f"reward_weights.{reward}": 1.0},
        learner={"rate": rate, "num_warmup_steps": 5, "tokens_per_pack": 16_384},
        # (the start has learnt to read reports without the attempt: `retries`)
        recovery=recovery if recovers else {},
        evaluate_every=evaluate_every,
        num_evaluation_examples=num_evaluation_examples,
        seed=seed,
        save_every_steps=10,
        has_tensorboard=False,
    )


def smoke(
    reward: str = "context",
    recovers: bool = True,
    model_dir: str = "openkeye-tiny",
    run_dir: str = "runs/context_rl/smoke",
    out_dir: str = "runs/context_rl/smoke-model",
    num_steps: int = 2,
) -> PostTrainingConfig:
    """The same on a CPU in seconds: small groups, short answers, hardly any evaluation."""
    config = context_rl(reward, recovers, model_dir=model_dir, run_dir=run_dir, out_dir=out_dir, num_steps=num_steps)
    learner = {**config.learner, "tokens_per_pack": 4096}
    small = {"group_size": 4, "groups_per_step": 2, "num_slots": 12, "evaluate_every": num_steps, "num_evaluation_examples": 4}
    # The bundled model solves none of these, so that no group would be left.
    algorithm = {**config.algorithm, "drops_zero_variance": False}
    return replace(config, learner=learner, algorithm=algorithm, **small)
