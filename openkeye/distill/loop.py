"""Multi-teacher on-policy distillation. Open this file first.

A step: examples ──> the student answers each once (`Policy`) ──> its teacher by (modality, task) (`teachers.TeacherRoutes`)
──> both read the same? (`alignment`) ──> the teacher scores the answer as soon as it is there (`teachers.TeacherPool`)
──> what each token counts for (`streams`: categories, repetition, domains) ──> one optimizer step (`Learner`) ──> new weights

Who plays, scores and learns are Protocols; the same loop runs over an engine and sharded ranks, or in one process.
"""

import asyncio
import json
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from openkeye.common.checks import InputError, writing_to
from openkeye.common.fields import unknown
from openkeye.common.log import forget_after
from openkeye.data.document import Document
from openkeye.data.mixture import keyed, permuted
from openkeye.distill.alignment import PromptReader, check_lengths, find_mismatch, is_finite, is_own_prompt
from openkeye.distill.config import DistillConfig, DistillRun
from openkeye.distill.run_folder import claim_run_dir
from openkeye.distill.scored import Scored, prompt_document
from openkeye.distill.streams import Record, TaughtSample, read_tokens, step_streams
from openkeye.distill.teachers import TeacherPool, TeacherRoutes
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.tokenizer import TextTokenizer
from openkeye.rl.rollout import Rollout, RolloutId, TokenStreams
from openkeye.tasks.task import Example, Task

LOG_FILE = "log.jsonl"
OPEN_THINKING = "<think>"


class Policy(Protocol):
    """The student as it answers."""

    async def roll(self, example: Example, id: RolloutId) -> Rollout:
        """One answer, or one episode; "failed" where its environment broke."""
        ...

    async def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Answer with these weights from now on."""
        ...


class StudentScorer(Protocol):
    """The student as it reads: its own likeliest tokens at every place, by the weights that it answers with."""

    async def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `scored.ResponseScorer.score`."""
        ...


class Learner(Protocol):
    """The student as it learns (`openkeye.rl`), made with `streams.SupportDivergence`."""

    @property
    def version(self) -> int:
        """Steps that its weights have behind them."""
        ...

    def step(self, samples: Sequence[Any]) -> Record:
        """One optimizer step over all samples."""
        ...

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """What `Policy.publish` takes."""
        ...

    def save(self) -> None:
        """Write a checkpoint, which a later process goes on from."""
        ...

    def write_model(self, out_dir: Path) -> None:
        """Write the student in the published layout."""
        ...


@dataclass(frozen=True)
class DistillParts:
    """Everyone that a distillation directs."""

    policy: Policy
    student: StudentScorer
    learner: Learner
    pool: TeacherPool
    student_reader: PromptReader
    teacher_readers: Mapping[str, PromptReader]
    # by name of the teacher
    tasks: Mapping[str, Task]
    tokenizer: TextTokenizer | None
    # None where tokens are no text
    vocab_size: int
    make_sample: Callable[[Document, Rollout, TokenStreams], Any]
    # what the learner takes
    make_document: Callable[[Prompt, Rollout], Document] = lambda prompt, rollout: prompt_document(
        prompt, rollout.output_ids, str(rollout.id)
    )
    close: Callable[[], None] = lambda: None
    # lets go of engines and ranks, at the end of a run


@dataclass(frozen=True)
class Taught:
    """A sample, and the prompt that the student answered."""

    sample: TaughtSample
    prompt: Prompt


class Distillation:
    """See the top of this file."""

    def __init__(self, config: DistillConfig, parts: DistillParts) -> None:
        """
        Raises:
            InputError: routes to nobody, a teacher without a reader, or more tokens to tell than allowed.
        """
        self.config, self.parts = config, parts
        self.routes = TeacherRoutes(config.routes, config.teachers)
        self._num_told = config.num_told(parts.vocab_size)
        for name in config.teachers:
            if name not in parts.teacher_readers:
                raise unknown("reader of teacher", name, parts.teacher_readers)

    async def step(self, examples: Sequence[Example], step: int) -> Record:
        """Answer, have scored, learn, publish.

        Returns:
            figures: the learner's, overlap and divergence by domain, dropped samples by reason, what teachers have cost; `step`
            counts from 1.

        Raises:
            InputError: an example that nobody teaches, or a step of which nothing is left.
        """
        began = time.monotonic()
        parts = self.parts
        names = [self.routes.teacher_of(example.modality, example.task) for example in examples]
        parts.pool.begin_step(Counter(names))
        tasks = [
            asyncio.create_task(self._teach(example, name, RolloutId(example.task, example.number, step, member)))
            for member, (example, name) in enumerate(zip(examples, names, strict=True))
        ]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        seen = [result for result in results if isinstance(result, Taught)]
        dropped = Counter(result for result in results if isinstance(result, str))
        if not seen:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.items())
            raise InputError(
                f"step {step}: nothing to learn from, all samples were dropped ({reasons}); mend what they tell of"
            )
        streams, record = step_streams([one.sample for one in seen], self.config)
        scored_seconds = time.monotonic() - began
        learnt = await asyncio.to_thread(self._learn, seen, streams)
        await parts.policy.publish(parts.learner.version, parts.learner.weights())
        record |= {f"dropped/{reason}": number for reason, number in dropped.items()}
        record |= {f"teachers/{name}": value for name, value in vars(parts.pool.take_figures()).items()}
        seconds = {"score_seconds": scored_seconds, "step_seconds": time.monotonic() - began}
        return learnt | record | seconds | {"step": parts.learner.version, "num_samples": len(seen)}

    def _learn(self, seen: Sequence[Taught], streams: Sequence[TokenStreams]) -> Record:
        parts = self.parts
        samples = [
            parts.make_sample(parts.make_document(one.prompt, one.sample.rollout), one.sample.rollout, own)
            for one, own in zip(seen, streams, strict=True)
        ]
        return parts.learner.step(samples)

    async def _teach(self, example: Example, name: str, id: RolloutId) -> Taught | str:
        rollout = None
        try:
            rollout = await self.parts.policy.roll(example, id)
        finally:
            if rollout is None:
                self.parts.pool.withdraw(name)
        return await self.teach(example, name, rollout)

    async def teach(self, example: Example, name: str, rollout: Rollout) -> Taught | str:
        """What a teacher says of a finished answer, or why it is not asked (`alignment.MISMATCHES`, "failed").

        Raises:
            InputError: an unknown teacher, or weights of one that cannot be loaded.
        """
        pool, is_asked = self.parts.pool, False
        try:
            if rollout.finish_reason == "failed" or not rollout.num_policy_tokens:
                return "failed"
            prompts = await self._prompts(example, name, rollout)
            if isinstance(prompts, str):
                return prompts
            own_prompt, teacher_prompt = prompts
            student = None
            if self.config.asks_student:
                k = min(self.config.estimator.top_k, self.parts.vocab_size)
                student = await self.parts.student.score(own_prompt, rollout.output_ids, None, k)
                check_lengths(student, rollout, 0)
            chosen_ids = None if student is None else student.top_ids
            is_asked = True
            scored = await pool.score(name, teacher_prompt, rollout.output_ids, chosen_ids, self._num_told)
        finally:
            if not is_asked:
                pool.withdraw(name)
        check_lengths(scored, rollout, 0 if chosen_ids is None else chosen_ids.shape[1])
        if not is_finite(scored):
            return "not_finite"
        begins_in_thinking = own_prompt.text.rstrip().endswith(OPEN_THINKING)
        tokens = await asyncio.to_thread(
            read_tokens, rollout, self.parts.tokenizer, bool(own_prompt.pictures), begins_in_thinking, self.config.repetition
        )
        return Taught(TaughtSample(rollout, name, scored, student, tokens), own_prompt)

    async def _prompts(self, example: Example, name: str, rollout: Rollout) -> tuple[Prompt, Prompt] | str:
        """(the student's prompt, the teacher's) where both read the same; else what differs."""
        own, other = self.parts.student_reader, self.parts.teacher_readers[name]
        try:
            own_prompt = await own.read(example)
            teacher_prompt = await other.read(example)
        except InputError:
            return "unreadable"
        if not is_own_prompt(own_prompt, rollout):
            return "student_prompt"
        mismatch = find_mismatch(own_prompt, teacher_prompt, own.identity, other.identity)
        return mismatch or (own_prompt, teacher_prompt)


def step_examples(run: DistillRun, tasks: Mapping[str, Task], step: int) -> list[Example]:
    """The examples of a step, a pure function of the settings: tasks are mixed within it, each is walked through in a shuffled
    order, so that no teacher has the student for itself for long.

    Raises:
        InputError: a task that nobody knows.
    """
    names = [name for name, weight in sorted(run.tasks.items()) if weight > 0]
    for name in names:
        if name not in tasks:
            raise unknown("task", name, tasks)
    sums = list(accumulate(run.tasks[name] for name in names))
    examples = []
    for place in range(step * run.rollouts_per_step, (step + 1) * run.rollouts_per_step):
        chance = (keyed("distill", run.seed, place) >> 11) / 2**53
        task = tasks[names[bisect_right(sums, chance * sums[-1], 0, len(sums) - 1)]]
        size = task.num_examples
        number = place
        if size is not None:
            epoch, rest = divmod(place, size)
            number = permuted(rest, size, keyed("examples", run.seed, task.name, epoch))
        examples.append(task.read(number))
    return examples


async def distill(
    run: DistillRun, parts: DistillParts, tell: Callable[[Record], None], is_asked_to_stop: Callable[[], bool] = lambda: False
) -> bool:
    """The whole run, from the learner's version on; False where it was stopped before its end.

    A process that is killed loses what lies behind the learner's last checkpoint: the next one repeats those steps, from the
    same weights, over the same examples, under the same rollout ids. A step's line is in the log before its checkpoint, and
    lines behind the checkpoint are forgotten, so that the log has each step once.

    Raises:
        InputError: as `Distillation.step`, or the folders cannot be written.
    """
    distillation = Distillation(run.distill, parts)
    folder = Path(run.run_dir)
    claim_run_dir(run)
    forget_after(folder / LOG_FILE, parts.learner.version)
    try:
        await parts.policy.publish(parts.learner.version, parts.learner.weights())
        while parts.learner.version < run.num_steps:
            if is_asked_to_stop():
                parts.learner.save()
                return False
            step = parts.learner.version
            record = await distillation.step(step_examples(run, parts.tasks, step), step)
            with writing_to(folder), (folder / LOG_FILE).open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            if parts.learner.version % run.save_every_steps == 0 or parts.learner.version == run.num_steps:
                parts.learner.save()
            tell(record)
        parts.learner.write_model(Path(run.out_dir))
        return True
    finally:
        await parts.pool.close()
        parts.close()
