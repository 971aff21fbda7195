"""A learner that steps and saves until it is killed, and tells its version and the sum of its weights before each save.

python -m tests.rl.saving_learner FOLDER
"""

import sys
from pathlib import Path

from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.learner import opened_learner
from tests.rl.toy_rollouts import toy_config, toy_group
from tests.train.toy_runs import CPU


def main() -> None:
    samples = toy_group(0, size=2)
    with opened_learner(toy_config(Path(sys.argv[1])), AlgorithmConfig(), CPU) as learner:
        while True:
            learner.step(samples)
            total = float(sum(tensor.double().sum() for _, tensor in learner.weights(is_whole=True)))
            learner.save({"journal": learner.version})
            print(learner.version, total, flush=True)


if __name__ == "__main__":
    main()
