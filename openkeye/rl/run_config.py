"""Typed settings of a run of reinforcement learning or distillation: what is asked, how it is played, when it is learnt."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError, writing_to
from openkeye.rl.journal import LINES

Option = str | int | float | bool
TAKES = ("finished", "opened")
SETTINGS_FILE = "settings.json"
JOURNAL_DIR = "journal"
MAY_CHANGE = {
    "run_dir", "out_dir", "num_workers", "num_slots", "num_environments", "num_scorers", "num_ranks", "has_tensorboard",
    "rollout_seconds", "blocked_seconds", "max_losses", "save_every_steps",
}  # fmt: skip
# between two starts of a run: where it lies, and how many share the work


@dataclass(frozen=True)
class TaskConfig:
    """Questions of one kind."""

    reader: str
    # which task it is: a name that whoever opens the roles knows
    weight: float = 1.0
    # how often it is asked, counting groups
    options: Mapping[str, Option] = field(default_factory=dict)
    # of that task

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"task {self.reader!r}: weight is {self.weight}; give a number from 0 on")


@dataclass(frozen=True)
class PostTrainingConfig:
    """A whole run."""

    model_dir: str
    # where it begins
    run_dir: str
    # journal, checkpoints, weights on their way to workers, logs and curves
    out_dir: str
    # the finished model in the published layout
    tasks: Mapping[str, TaskConfig]
    num_steps: int
    # updates
    opens: str
    # module:function that makes the roles from these settings
    group_size: int = 8
    # rollouts of an example
    groups_per_step: int = 8
    oversampling: float = 1.25
    # groups open for an update, as a multiple of those that it takes: some will be dropped, some are slow
    max_age: int = 1
    # updates that may lie between the oldest token of a rollout and the update that learns it; 0: none, sampled by the very
    # weights that learn from it
    takes: str = "finished"
    # which groups an update takes: "finished" first, so that nobody waits for a slow one; or in the order that they were
    # "opened" in, which waits, favours no short answers, and repeats exactly
    keeps_partial: bool = True
    # rollouts under way go on under new weights; False: weights wait until nothing is under way
    max_dropped: int = 200
    # groups in a row with nothing to learn from, after which the run ends
    algorithm: Mapping[str, Option] = field(default_factory=dict)
    learner: Mapping[str, Option] = field(default_factory=dict)
    engine: Mapping[str, Option] = field(default_factory=dict)
    episode: Mapping[str, Option] = field(default_factory=dict)
    recovery: Mapping[str, Option] = field(default_factory=dict)
    # of failed groups (`context_rl.RecoverySettings`); fields by name of the settings that these have of their own
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048
    # of one turn
    rollout_seconds: float = 600.0
    # for a whole rollout, its environment and tools included; a later one has failed
    blocked_seconds: float = 60.0
    # for which code of an environment may hold up a worker's process, before that is ended
    max_losses: int = 3
    # processes that may die under a rollout, or under an update, before it is given up
    evaluate_every: int = 0
    # steps; 0: never
    evaluation_tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    num_evaluation_examples: int = 64
    # of each task, its first ones
    seed: int = 0
    num_workers: int = 0
    # processes that play rollouts; 0: this process plays them, and does everything else
    num_slots: int = 16
    # rollouts that a worker plays at once
    num_environments: int = 0
    # processes beside each worker that environments act in; 0: in the worker's own, which one that hangs takes along
    reference_dir: str = ""
    # weights of the reference policy, where `algorithm.ref_kl_weight` is above 0; empty: those of model_dir
    num_scorers: int = 0
    # processes with the reference policy beside those of workers; where it is asked at all there is one
    num_ranks: int = 1
    # processes that train, where num_workers is above 0
    save_every_steps: int = 10
    has_tensorboard: bool = True

    def __post_init__(self) -> None:
        """Raises InputError where the run contradicts itself."""
        least = {
            "num_steps": 1, "group_size": 1, "groups_per_step": 1, "max_age": 0, "max_dropped": 1, "max_tokens": 1,
            "max_losses": 1, "evaluate_every": 0, "num_evaluation_examples": 1, "num_workers": 0, "num_slots": 1,
            "num_environments": 0, "num_scorers": 0, "num_ranks": 1, "save_every_steps": 1,
        }  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} is {getattr(self, name)}; give at least {value}")
        for name in ("temperature", "top_p", "rollout_seconds", "blocked_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.top_p > 1:
            raise InputError(f"top_p is {self.top_p}; give a share up to 1")
        if not (math.isfinite(self.oversampling) and self.oversampling >= 1):
            raise InputError(f"oversampling is {self.oversampling}; give a number from 1 on")
        if self.takes not in TAKES:
            raise InputError(f"takes is {self.takes!r}; choose one of {', '.join(TAKES)}")
        if not any(task.weight > 0 for task in self.tasks.values()):
            raise InputError("tasks has nothing with a weight above 0; give at least one")
        if twice := [name for name in self.tasks if self.evaluation_tasks.get(name, self.tasks[name]) != self.tasks[name]]:
            raise InputError(
                f"tasks and evaluation_tasks both name {', '.join(twice)}, with other settings; rename one of them"
            )
        if self.evaluate_every and not self.evaluation_tasks:
            raise InputError("evaluate_every is set and evaluation_tasks is empty; name tasks there, or set it to 0")
        if ":" not in self.opens:
            raise InputError(f"opens is {self.opens!r}; give MODULE:FUNCTION that makes the roles")

    @property
    def max_open_groups(self) -> int:
        """Groups open at once: what an update takes with the over-sampling, and a whole update for every version of age."""
        return math.ceil(self.groups_per_step * self.oversampling) + self.groups_per_step * self.max_age


def claim_run_dir(config: PostTrainingConfig) -> None:
    """Write the settings down, so that a later start knows whose folder it is.

    Raises:
        InputError: the folder holds another run, whose differing fields are named; or it cannot be written.
    """
    folder, own = Path(config.run_dir), _as_json(config)
    path = folder / SETTINGS_FILE
    # A start that was refused before anything happened leaves a folder that any settings may take.
    has_begun = any(lines.stat().st_size for lines in (folder / JOURNAL_DIR).glob(f"*{LINES}"))
    if path.is_file() and has_begun:
        saved = json.loads(path.read_text())
        told = [
            f"{name} was {saved.get(name)!r} and is {own[name]!r}"
            for name in own
            if name not in MAY_CHANGE and saved.get(name) != own[name]
        ]
        if told:
            raise InputError(f"{folder} belongs to a run with other settings ({'; '.join(told)}); give another run_dir")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{SETTINGS_FILE}.unfinished"
        unfinished.write_text(json.dumps(own, indent=1) + "\n")
        os.replace(unfinished, path)


def _as_json(config: PostTrainingConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))
