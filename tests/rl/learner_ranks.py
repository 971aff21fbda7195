"""A learner over the ranks that the environment names: each leaves its gradients and records in a file.

python -m tests.rl.learner_ranks FOLDER NAME
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks, rank
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample
from tests.rl.toy_rollouts import toy_config, toy_group, with_routes
from tests.train.toy_runs import CPU

ALGORITHM = AlgorithmConfig(
    "gspo", clip_low=0.1, clip_high=0.1, correction="sequence_mask", correction_low=0.1, correction_high=9
)


def all_samples(step: int) -> list[list[LearnerSample]]:
    """Groups of a step: pictures in some, routes in others, and more of them than ranks."""
    groups = []
    for number in range(5):
        group = toy_group(10 * step + number, size=2 + number % 3, algorithm=ALGORITHM, has_picture=number % 2 == 0)
        groups.append([with_routes(one, 2) if number > 2 else one for one in group])
    return groups


def config_of(folder: Path, name: str) -> LearnerConfig:
    trains = ("vision", "projector", "decoder", "indexer")
    return toy_config(
        folder,
        run_dir=str(folder / name),
        trains=trains,
        indexer_target="selected",
        rate=1e-5,
        tokens_per_pack=80,
        num_minibatches=2,
        recomputes=name == "recomputed",
    )


def run(folder: Path, name: str) -> dict[str, Any]:
    """Two steps, and an update of two minibatches; the last rank has all of the groups but one, and so more packs."""
    gradients: list[dict[str, Tensor]] = []
    with opened_learner(config_of(folder, name), ALGORITHM, CPU) as learner:
        step = learner.optimizer.step

        def keeping_step(rates: Mapping[str, float]) -> Tensor:
            gradients.append(gradients_of(learner))
            return step(rates)

        learner.optimizer.step = keeping_step  # type: ignore[method-assign]
        records, logprobs = [], {}
        for number in range(2):
            groups = all_samples(number)
            if num_ranks() > 1:
                groups = groups[:1] if rank() == 0 else groups[1:]
            samples = [one for group in groups for one in group]
            logprobs |= {str(one.rollout.id): own for one, own in zip(samples, learner.logprobs(samples), strict=True)}
            records.append(learner.step(samples))
        kept = list(gradients)
        # Of the first rank's two minibatches one is empty.
        minibatches = learner.update(samples)
        too_long = toy_group(99, size=2, num_prompt=200, algorithm=ALGORITHM)
        refused = ""
        try:
            learner.step(too_long if rank() == 0 else samples)
        except InputError as error:
            refused = str(error)
        weights = dict(learner.weights(is_whole=True))
        learner.save({"journal": 7})
    return {
        "gradients": kept,
        "records": records,
        "minibatches": minibatches,
        "refused": refused,
        "logprobs": logprobs,
        "weights": weights,
    }


def gradients_of(learner: Learner) -> dict[str, Tensor]:
    gradients = {}
    for one in learner.optimizer.parameters:
        gradient = one.parameter.grad
        assert gradient is not None, one.name
        gradients[one.name] = gradient.full_tensor().clone()  # type: ignore[attr-defined]
    return gradients


def main() -> None:
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    torch.save(run(folder, name), folder / f"{name}.{rank()}.pt")


if __name__ == "__main__":
    main()
