"""The parts of a distillation whose tasks are those of `openkeye tasks`: what `DistillRun.opens` names in recipes."""

from collections.abc import Mapping

from openkeye.common.checks import InputError
from openkeye.common.fields import unknown, with_fields
from openkeye.distill.config import DistillRun, Option
from openkeye.distill.engine_parts import open_engine_parts
from openkeye.distill.loop import DistillParts
from openkeye.engine.config import EngineConfig
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Task

ENGINE = "engine"


def open_parts(run: DistillRun) -> DistillParts:
    """Engines and learner on this process's device. `run.options`: `TASK.OPTION` of a task, `engine.FIELD` of `EngineConfig`.

    Raises:
        InputError: a task, an option or a field that nobody knows.
    """
    of_tasks, of_engine = options_by_owner(run)
    tasks: dict[str, Task] = {name: open_task(name, of_tasks[name]) for name in run.tasks}
    engine = with_fields(EngineConfig(), [f"{name}={value}" for name, value in of_engine.items()])
    return open_engine_parts(run, tasks, engine)


def options_by_owner(run: DistillRun) -> tuple[dict[str, dict[str, Option]], Mapping[str, Option]]:
    """(options of each task by its name, fields of the engines).

    Raises:
        InputError: an option of nobody.
    """
    owners: dict[str, dict[str, Option]] = {name: {} for name in (*run.tasks, ENGINE)}
    for path, value in run.options.items():
        owner, has_name, name = path.partition(".")
        if not has_name:
            raise InputError(f"option {path!r} belongs to nobody; give TASK.OPTION or {ENGINE}.FIELD")
        if owner not in owners:
            raise unknown(f"option {path}: task", owner, owners)
        owners[owner][name] = value
    return owners, owners[ENGINE]
