"""`openkeye evaluate task NAME [option=value ...]`: how well a model answers, by the rewards of training."""

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from openkeye.apps.model_options import add_model_options, engine_from
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine
    from openkeye.rl.rollout import Rollout
    from openkeye.tasks.task import Task

NUM_AT_ONCE = 32
# episodes under way


def add_task_suite(suite: argparse.ArgumentParser) -> None:
    """Options of the suite."""
    suite.add_argument("task", metavar="NAME", help="a task (`openkeye tasks`)")
    suite.add_argument("words", nargs="*", metavar="option=value", help="options of the task")
    suite.add_argument("--num", type=int, default=100, metavar="N", help="examples (default: 100)")
    suite.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (default: 0)")
    suite.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to each; above 1 they are sampled (default: 1)"
    )
    suite.add_argument("--temperature", type=float, default=None, help="default: 0 for one answer, 1 for several")
    suite.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of a turn (default: 512)")
    suite.add_argument("--seed", type=int, default=0, help="of sampling")
    suite.add_argument("--answers", default=None, metavar="FILE", help="write every answer with its rewards, as JSON lines")
    suite.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(suite)


def run(arguments: argparse.Namespace) -> int:
    """Ask, score, print."""
    from openkeye.apps.task_words import task_from
    from openkeye.apps.tasks import numbers_of

    task = task_from(arguments.task, arguments.words)
    numbers = numbers_of(task, arguments.first, arguments.num)
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}; give at least 1")
    if arguments.answers:
        # Before hours of answers, not after.
        write_answers(arguments.answers, [])
    rollouts = asyncio.run(_play(arguments, task, numbers, engine_from(arguments, arguments.attention)))
    if arguments.answers:
        write_answers(arguments.answers, rollouts)
    report = report_of(rollouts, len(numbers))
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_table(arguments, report)
    return 0


async def _play(arguments: argparse.Namespace, task: "Task", numbers: range, engine: "Engine") -> "list[Rollout]":
    """Every answer, in the order of the examples."""
    from rich.console import Console
    from rich.progress import Progress

    from openkeye.engine.config import SamplingParameters
    from openkeye.rl.episode import EpisodeLimits, run_episode
    from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine
    from openkeye.rl.rollout import RolloutId

    temperature = arguments.temperature
    if temperature is None:
        temperature = 0.0 if arguments.samples == 1 else 1.0
    sampling = SamplingParameters(temperature=temperature)
    limits = EpisodeLimits(max_turn_tokens=arguments.max_tokens)
    policy, room = PolicyEngine(engine, PolicyConfig(arguments.seed)), asyncio.Semaphore(NUM_AT_ONCE)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Asking", total=len(numbers) * arguments.samples)

        async def play(number: int, sample: int) -> "Rollout":
            async with room:
                example = await asyncio.to_thread(task.read, number)
                id = RolloutId(arguments.task, number, number, sample)
                rollout = await run_episode(policy, task, example, id, sampling=sampling, limits=limits)
                progress.advance(bar)
                return rollout

        try:
            return list(await asyncio.gather(*(play(n, sample) for n in numbers for sample in range(arguments.samples))))
        finally:
            policy.close()


def report_of(rollouts: "list[Rollout]", num_examples: int) -> dict[str, Any]:
    """Means of the rewards with intervals over examples; an episode whose world broke counts as nothing right."""
    import numpy as np

    from openkeye.apps.intervals import interval

    names = sorted({name for rollout in rollouts for name in rollout.rewards} | {"outcome"})
    examples = np.array([rollout.id.number for rollout in rollouts])
    report: dict[str, Any] = {"num_examples": num_examples, "num_answers": len(rollouts)}
    report["rewards"] = {}
    for name in names:
        values = np.array([rollout.rewards.get(name, 0.0) for rollout in rollouts])
        report["rewards"][name] = {"mean": float(values.mean()), "interval": interval(values, examples)}
    report["mean_tokens"] = float(np.mean([rollout.num_policy_tokens for rollout in rollouts]))
    report["finished"] = {
        reason: sum(rollout.finish_reason == reason for rollout in rollouts) for reason in ("stop", "length", "failed")
    }
    return report


def write_answers(path: str, rollouts: "list[Rollout]") -> None:
    """Every answer with its rewards, as JSON lines (`openkeye.rl.task_answers` learns from them)."""
    from pathlib import Path

    from openkeye.common.checks import writing_to

    with writing_to(Path(path)):
        lines = [
            json.dumps(
                {
                    "id": str(one.id),
                    "number": one.id.number,
                    "answer": one.text,
                    "finish": one.finish_reason,
                    "rewards": dict(one.rewards),
                }
            )
            for one in rollouts
        ]
        Path(path).write_text("".join(f"{line}\n" for line in lines))


def _print_table(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arguments.task}: {report['num_examples']} examples, {report['num_answers']} answers")
    for column in ("reward", "mean", "95% interval"):
        table.add_column(column)
    for name, row in report["rewards"].items():
        low, high = row["interval"]
        table.add_row(name, f"{row['mean']:.3f}", f"{low:.3f} - {high:.3f}")
    Console().print(table)
    print(f"{report['mean_tokens']:.1f} tokens an answer; " + ", ".join(f"{n} {r}" for r, n in report["finished"].items()))
