"""What a log tells of rollouts: rewards by name, lengths, repetition, ages. Figures of the loss come from the learner."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from openkeye.rl.roles import Record
from openkeye.rl.rollout import Rollout

NGRAM = 8
# tokens that have to recur in a row to count as repeated
COUNTED = ("dropped_zero_variance", "dropped_failed", "stale", "resumed", "failed", "asked_again")


def rollout_figures(rollouts: Sequence[Rollout], version: int) -> Record:
    """Of the rollouts that an update learns from, which begins at a version."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in rollout.rewards.items():
            rewards[f"reward/{name}"].append(value)
        if "outcome" in rollout.rewards:
            rewards[f"outcome/{rollout.id.task}"].append(rollout.rewards["outcome"])
    lengths = [rollout.num_policy_tokens for rollout in rollouts]
    versions = np.concatenate([rollout.versions[rollout.is_policy] for rollout in rollouts])
    record: Record = {name: float(np.mean(values)) for name, values in sorted(rewards.items())}
    record |= {
        "num_rollouts": len(rollouts),
        "sampled_tokens": sum(lengths),
        "length": float(np.mean(lengths)),
        "length_max": max(lengths),
        "cut_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "repetition_share": float(np.mean([repetition_share(rollout.output_ids[rollout.is_policy]) for rollout in rollouts])),
        "age": float(version - versions.mean()) if len(versions) else 0.0,
        "age_max": max(rollout.age(version) for rollout in rollouts),
        "mixed_share": float(np.mean([_num_versions(rollout) > 1 for rollout in rollouts])),
    }
    return record


def repetition_share(ids: np.ndarray, length: int = NGRAM) -> float:
    """The share of a row's n-grams that have stood in it before; 0 where it is shorter than one."""
    if len(ids) < length:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(ids), length)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def count_figures(counts: Mapping[str, int], num_open: int, num_lost: int) -> Record:
    """What has become of groups and rollouts since the update before.

    Args:
        counts: of the group book.
        num_open: groups, those of the update among them.
        num_lost: rollouts of this process' life that a worker died under.
    """
    record: Record = {f"groups/{name}": counts.get(name, 0) for name in COUNTED}
    return record | {"groups/open": num_open, "groups/lost": num_lost}


def evaluation_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean rewards of an evaluation by task; a rollout that failed scores 0 in everything."""
    by_task: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_task[rollout.id.task].append(rollout)
    scores = {}
    for task, played in sorted(by_task.items()):
        for name in sorted({name for rollout in played for name in rollout.rewards} | {"outcome"}):
            scores[f"evaluation/{task}/{name}"] = float(np.mean([rollout.rewards.get(name, 0.0) for rollout in played]))
    return scores


def _num_versions(rollout: Rollout) -> int:
    return len(np.unique(rollout.versions[rollout.is_policy]))
