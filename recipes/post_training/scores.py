"""Scores of one model on many domains in one process: its weights are loaded, and graphs captured, once.

    python -m recipes.post_training.scores --model STUDENT --folder runs/mopd/scores/student/seed0 reading counting
    python -m recipes.post_training.scores --model TEACHER --split train --answers --folder answers --num 600 reading

A domain may name its clips: `counting_story`. What is there already is left alone; status 3 where time ran out before the last.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from openkeye.apps.evaluate_task import NUM_AT_ONCE, report_of, write_answers
from openkeye.apps.run_arguments import NOT_FINISHED
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.rl.episode import EpisodeLimits, run_episode
from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Task
from recipes.post_training.domains import CLIPS, task_of


async def play(policy: PolicyEngine, task: Task, num: int, max_tokens: int, temperature: float) -> list[Rollout]:
    """One answer to each of the first examples, so many under way at once."""
    room = asyncio.Semaphore(NUM_AT_ONCE)
    sampling, limits = SamplingParameters(temperature=temperature), EpisodeLimits(max_turn_tokens=max_tokens)

    async def one(number: int) -> Rollout:
        async with room:
            example = await asyncio.to_thread(task.read, number)
            id = RolloutId(task.name, number, number, 0)
            return await run_episode(policy, task, example, id, sampling=sampling, limits=limits)

    return list(await asyncio.gather(*(one(number) for number in range(num))))


def main(arguments: argparse.Namespace) -> int:
    """Score what is missing; 0, or 3 where time ran out."""
    began, ending = time.monotonic(), "jsonl" if arguments.answers else "json"
    missing = [name for name in arguments.domains if not (Path(arguments.folder) / f"{name}.{ending}").is_file()]
    if not missing:
        return 0
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    engine = EngineConfig(prefill_chunk_tokens=8192, vision_cache_bytes=1 << 30)
    policy = PolicyEngine(Engine(arguments.model, config=engine), PolicyConfig())
    try:
        for name in missing:
            if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
                return NOT_FINISHED
            domain, _, clips = name.rpartition("_")
            named = task_of(domain, arguments.split, clips=clips) if clips in CLIPS else task_of(name, arguments.split)
            task = open_task(named.reader, named.options)
            asked = time.monotonic()
            rollouts = asyncio.run(play(policy, task, arguments.num, arguments.max_tokens, arguments.temperature))
            report = report_of(rollouts, arguments.num) | {"model": arguments.model, "seconds": time.monotonic() - asked}
            path = Path(arguments.folder) / f"{name}.{ending}"
            unfinished = path.with_name(path.name + ".unfinished")
            if arguments.answers:
                write_answers(str(unfinished), rollouts)
            else:
                unfinished.write_text(json.dumps(report) + "\n")
            unfinished.replace(path)
            print(f"{path}: outcome {report['rewards']['outcome']['mean']:.3f}, {report['seconds']:.0f} s", file=sys.stderr)
    finally:
        policy.close()
    return 0


def parser() -> argparse.ArgumentParser:
    """The words above."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("domains", nargs="+")
    words.add_argument("--model", required=True)
    words.add_argument("--folder", required=True)
    words.add_argument("--split", choices=("train", "test"), default="test")
    words.add_argument("--answers", action="store_true", help="write answers, and no scores")
    words.add_argument("--num", type=int, default=300)
    words.add_argument("--max-tokens", type=int, default=160)
    words.add_argument("--temperature", type=float, default=0.0)
    words.add_argument("--seconds", type=float, default=None, help="after which no further domain is begun")
    return words


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
