"""The orchestrator killed at random moments, as a real process, again and again: the run ends as if nothing had happened."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from openkeye.apps.curves import read_log
from tests.rl.stand_ins import config_of, result_of, run_here, start_run

LIFETIMES = 200
# after which a run that does not end is one that stands still
NUM_SHORT = 8


def end_of(folder: Path, seed: int, **changes: object) -> int:
    """Starts the run until it ends by itself; returns how often it was killed."""
    draw = random.Random(seed)
    for number in range(LIFETIMES):
        # Lives that are too short for the whole run, then longer and longer ones, so that it ends.
        growth = max(0, number - NUM_SHORT)
        num_bytes, seconds = draw.randrange(1, 4000) + 1000 * growth, draw.uniform(0.1, 0.3) + 0.1 * growth
        is_timed = draw.random() < 0.3
        process = start_run(folder, **changes, **({} if is_timed else {"dies_after_bytes": num_bytes}))
        if is_timed:
            deadline = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.kill()
        if process.wait() == 0:
            return number
        assert process.returncode == -9, process.returncode
    raise AssertionError(f"not at its end after {LIFETIMES} kills")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_again_and_again_learns_what_an_unbroken_one_does(tmp_path, seed):
    unbroken = config_of(tmp_path / "unbroken", num_steps=4)
    run_here(unbroken)
    # Small segments, so that kills meet compactions too.
    num_kills = end_of(tmp_path / "broken", seed, num_steps=4, least_compacted_bytes=4000)
    assert num_kills >= NUM_SHORT, "otherwise this shows nothing"
    broken = config_of(tmp_path / "broken", num_steps=4)
    assert result_of(broken) == result_of(unbroken)
    assert Counter(result_of(broken)["learnt"]).most_common(1)[0][1] == 1
    assert [record["step"] for record in read_log(Path(broken.run_dir))] == [1, 2, 3, 4]


def test_with_old_rollouts_and_the_first_to_finish_nothing_is_learnt_twice(tmp_path):
    changes = {"max_age": 2, "takes": "finished", "num_steps": 4}
    num_kills = end_of(tmp_path, 5, **changes, least_compacted_bytes=4000)
    assert num_kills >= NUM_SHORT
    config = config_of(tmp_path, **changes)
    learnt = [line.split()[:2] for line in result_of(config)["learnt"]]
    assert len(learnt) == len({id for _, id in learnt}) == 4 * 2 * 3
    assert Counter(version for version, _ in learnt) == {str(version): 6 for version in range(4)}
