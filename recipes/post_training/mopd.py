"""Multi-teacher on-policy distillation (report, MOPD) of the teachers of `teachers.py` into one student.

    openkeye distill recipes/post_training/mopd.py folder=runs/mopd/teachers out_dir=runs/mopd/student
    openkeye distill recipes/post_training/mopd.py estimator=sampled leave_out=reading out_dir=runs/mopd/without

`mopd.sh` makes teachers, students, their rivals and every switch, and `mopd_table.py` one table of them.
"""

from collections.abc import Mapping
from dataclasses import replace

from openkeye.common.checks import InputError
from openkeye.data.config import Share, SourceConfig
from openkeye.distill.config import DistillConfig, DistillRun
from openkeye.distill.estimator_config import EstimatorConfig
from openkeye.distill.repetition import RepetitionConfig
from openkeye.distill.scaling import ScalingConfig
from openkeye.rl.run_config import Option
from openkeye.train.config import RunConfig, StageConfig
from recipes.post_training.domains import DOMAINS, RATE, TAUGHT, check_domains, engine_settings, task_of

LEAST_TEACHERS = 5


def mopd(
    folder: str = "runs/mopd/teachers",
    domains: tuple[str, ...] = TAUGHT,
    leave_out: str = "",
    model_dir: str = "openkeye-tiny",
    run_dir: str = "",
    out_dir: str = "runs/mopd/student",
    estimator: str = "overlap_kl",
    support: str = "overlap",
    is_scaled: bool = True,
    penalty: float = 0.5,
    num_steps: int = 120,
    rollouts_per_step: int = 48,
    rate: float = RATE,
    seed: int = 0,
) -> DistillRun:
    """A student of all teachers.

    Args:
        folder: with a teacher for each domain, by its name.
        leave_out: a domain whose teacher is missing, and which is not asked either.
        estimator: overlap_kl, keye_literal, sampled or full.
        support: overlap, student or teacher: without the overlap's check, "student".
        is_scaled: whether token categories and domains count differently.
        penalty: of repetition; 0: none.

    Raises:
        InputError: a domain that is unknown, or too few of them.
    """
    if leave_out and leave_out not in domains:
        raise InputError(f"leave_out is {leave_out!r}; give one of {', '.join(domains)}")
    kept = tuple(name for name in check_domains(domains, LEAST_TEACHERS) if name != leave_out)
    return _run(
        folder, kept, model_dir, run_dir, out_dir, EstimatorConfig(estimator, support), is_scaled, penalty, num_steps,
        rollouts_per_step, rate, seed,
    )  # fmt: skip


def smoke(folder: str, run_dir: str = "runs/smoke", out_dir: str = "runs/smoke-model") -> DistillRun:
    """Two steps of two teachers over still pictures and text, in seconds on a CPU."""
    run = _run(
        folder, ("still_counting", "arithmetic"), "openkeye-tiny", run_dir, out_dir, EstimatorConfig(), True, 0.5, 2, 4, RATE, 0
    )
    return replace(run, max_tokens=8, options={**run.options, "engine.cache_tokens": 4096}, has_tensorboard=False)


def answers(
    data: Mapping[str, str],
    model_dir: str = "openkeye-tiny",
    run_dir: str = "",
    out_dir: str = "runs/mopd/sft",
    min_outcome: float = 0.0,
    num_steps: int = 120,
    tokens_per_step: int = 131_072,
    rate: float = RATE,
    num_workers: int = 8,
    seed: int = 0,
) -> RunConfig:
    """The rival that learns the teachers' own answers word by word, for `openkeye train`.

    Args:
        data: files of `openkeye evaluate task --answers`, by domain, of training examples: data.reading=FILE.
        min_outcome: of answers that are learnt; 1 keeps right ones alone.
    """
    sources = {}
    for name, path in data.items():
        # Drawn by workers, which have no GPU.
        words = {**task_of(name, "train").options, **({"device": "cpu"} if DOMAINS[name].modality == "video" else {})}
        said = " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in words.items())
        options: dict[str, str | int | float | bool] = {"task": DOMAINS[name].task, "options": said, "min_outcome": min_outcome}
        sources[name] = SourceConfig("openkeye.rl.task_answers:TaskAnswers", path, options)
    stage = StageConfig(
        name="answers",
        num_steps=num_steps,
        context=32_768,
        tokens_per_pack=32_768,
        packs_per_step=max(1, tokens_per_step // 32_768),
        mixture=tuple(Share(name) for name in data),
        trains=("decoder",),
        attention="sparse",
        rate=rate,
        num_warmup_steps=min(5, num_steps),
    )
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        sources=sources,
        stages=(stage,),
        seed=seed,
        num_workers=num_workers,
        save_every_seconds=60.0,
        weight_decay=0.0,
    )


def _run(
    folder: str,
    domains: tuple[str, ...],
    model_dir: str,
    run_dir: str,
    out_dir: str,
    estimator: EstimatorConfig,
    is_scaled: bool,
    penalty: float,
    num_steps: int,
    rollouts_per_step: int,
    rate: float,
    seed: int,
) -> DistillRun:
    options: dict[str, Option] = {f"engine.{key}": value for key, value in engine_settings().items()}
    for name in domains:
        own = task_of(name, "train", options={"seed": 1000 + seed}).options
        # (clips that no teacher has learnt from)
        options |= {f"{DOMAINS[name].task}.{key}": value for key, value in own.items()}
    config = DistillConfig(
        teachers={name: f"{folder}/{name}" for name in domains},
        routes={DOMAINS[name].label: name for name in domains},
        estimator=estimator,
        scaling=ScalingConfig() if is_scaled else ScalingConfig({}, 1.0, 1.0),
        repetition=RepetitionConfig(penalty=penalty),
    )
    return DistillRun(
        model_dir=model_dir,
        run_dir=run_dir or f"{out_dir.rstrip('/')}-run",
        out_dir=out_dir,
        distill=config,
        tasks={DOMAINS[name].task: 1.0 for name in domains},
        num_steps=num_steps,
        opens="openkeye.distill.named_tasks:open_parts",
        rollouts_per_step=rollouts_per_step,
        max_tokens=160,
        seed=seed,
        save_every_steps=20,
        learner={"trains": "decoder", "rate": rate, "num_warmup_steps": 5, "tokens_per_pack": 65_536},
        options=options,
    )
