"""Runs a recipe's jobs, some at once, and keeps what they make in the order of the jobs."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

from openkeye.common.checks import InputError
from openkeye.data.makers.made_sample import MadeSample, Recipe
from openkeye.data.makers.output import OutputFolder

OnJob = Callable[[int, int], None]
# called with (jobs done or skipped, jobs in all)


@dataclass
class MakeReport:
    """What became of the jobs of one run."""

    num_jobs: int
    num_done_before: int
    num_done: int = 0
    num_samples: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    # job and the reason, in one line
    num_empty: int = 0
    # jobs that gave no sample though their medium is good


def make_data(
    recipe: Recipe,
    output: OutputFolder,
    max_bad_share: float,
    num_workers: int = 1,
    on_job: OnJob | None = None,
    on_skip: Callable[[str], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> MakeReport:
    """Do what is not done yet.

    A job whose medium cannot be used is counted, told to `on_skip` and tried again by the next run.

    Args:
        max_bad_share: of all the recipe's jobs that may be skipped; one more ends the run.
        num_workers: threads that make samples at once.
        on_stop: called when a run ends before its last job, so that what is under way can hurry (`Captioner.stop`).

    Raises:
        InputError: too many jobs were skipped, or the output cannot be written. What was made is kept.
        CaptionerError: the captioner does not answer. What was made is kept.
    """
    if not 0.0 <= max_bad_share <= 1.0:
        raise InputError(f"the share of unusable media is {max_bad_share:g}; give a number from 0 to 1")
    if num_workers < 1:
        raise InputError(f"the number of workers is {num_workers}; give at least 1")
    jobs = recipe.jobs()
    todo = [job for job in jobs if job not in output.done]
    report = MakeReport(len(jobs), len(jobs) - len(todo))
    with closing(_in_order(recipe, todo, num_workers, on_stop)) as results:
        for job, future in results:
            try:
                samples = future.result()
            except InputError as error:
                report.skipped[job] = str(error)
                if on_skip is not None:
                    on_skip(f"skipped {job}: {error}")
                _check_share(recipe.name, report, max_bad_share)
            else:
                output.add(job, samples)
                report.num_done += 1
                report.num_samples += len(samples)
                report.num_empty += not samples
            if on_job is not None:
                on_job(report.num_done_before + report.num_done + len(report.skipped), len(jobs))
    return report


def _check_share(name: str, report: MakeReport, max_bad_share: float) -> None:
    if len(report.skipped) > max_bad_share * report.num_jobs:
        job, reason = list(report.skipped.items())[-1]
        raise InputError(
            f"{name}: {len(report.skipped)} of {report.num_jobs} jobs cannot be used, more than the share {max_bad_share:g}; "
            f"the last is {job} ({reason}): mend them, or raise --max-bad-share"
        )


def _in_order(
    recipe: Recipe, jobs: list[str], num_workers: int, on_stop: Callable[[], None] | None
) -> Generator[tuple[str, Future[list[MadeSample]]]]:
    """Jobs with their results in order; at most twice as many as there are workers lie ready."""
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="maker")
    waiting: deque[tuple[str, Future[list[MadeSample]]]] = deque()
    rest = iter(jobs)
    try:
        while True:
            for job in islice(rest, 2 * num_workers - len(waiting)):
                waiting.append((job, pool.submit(recipe.make, job)))
            if not waiting:
                return
            waiting[0][1].exception()
            yield waiting.popleft()
    finally:
        # After Ctrl-C or an error the jobs under way are waited for, the others never begin.
        if waiting and on_stop is not None:
            on_stop()
        pool.shutdown(cancel_futures=True)
