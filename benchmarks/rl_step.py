"""A step of reinforcement learning at size: rollouts, scores, an update, and its weights published, each timed.

    python -m benchmarks.rl_step [--layers 4] [--groups 16] [--group-size 8] [--prompt 2048] [--response 512] [--device cuda:0]
                                 [--learner-device cuda:1] [--only PHASE ...] [--folder DIR] [--append] [--tiny]

Layers of the 30B shape with random weights, which an engine and a learner load from one checkpoint: on one GPU, or on one each.
The memory is counted before anything starts. A whole round goes first and is thrown away; the second is told, beside what its
operations and bytes take at least. After every publication the engine's weights are compared with the learner's, bit by bit.
Figures that others published stand below, and were not measured here.
"""

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.measure import Disagreement, figure
from benchmarks.random_model import shape_30b, shape_tiny, text_prompt, topical_ids, write_random_model
from benchmarks.rehearsal import header
from benchmarks.rl_plan import GB, Counts, Machine, StepShape, Work, check_disk, count_memory
from benchmarks.rl_published import published_table
from benchmarks.rl_samples import ALGORITHM, samples_of
from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.scorer import Scorer
from openkeye.engine.update_file import write_update
from openkeye.engine.weight_update import Change, WeightUpdate, changes_between
from openkeye.inputs.prompt import Prompt
from openkeye.rl.config import LearnerConfig
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.policy_engine import PolicyEngine, SampledTurn
from openkeye.rl.rollout import RolloutId

PHASES = ("rollout", "score", "agreement", "update", "publish")
RESULTS = Path(__file__).parent / "results.md"
TASK = "random"
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    phase: str
    seconds: float
    work: Work | None = None
    # what it must do at least
    tokens: int = 0
    moved_bytes: int = 0
    # published ones
    note: str = ""

    def line(self, machine: Machine) -> str:
        seconds = max(self.seconds, 1e-9)
        floor = share = ""
        if self.work is not None:
            floor = figure(machine.seconds(self.work.flops, self.work.num_bytes))
            share = f"{self.work.flops / seconds / machine.peak_tflops / 1e12:.1%}"
        rate = f"{self.tokens / seconds:,.0f}" if self.tokens else ""
        moved = f"{self.moved_bytes / GB:.3g}" if self.moved_bytes else ""
        speed = f"{self.moved_bytes / seconds / GB:.2f}" if self.moved_bytes else ""
        cells = [self.phase, figure(self.seconds), floor, rate, share, moved, speed, self.note]
        return "| " + " | ".join(cells) + " |"


TABLE = "| phase | s | floor s | tokens/s | of peak | GB | GB/s | |\n|---|---|---|---|---|---|---|---|"


class Step:
    """An engine and a learner of the same weights, and what each round does with them."""

    def __init__(self, shape: StepShape, engine: Engine, learner: Learner, folder: Path) -> None:
        """folder: where publications lie."""
        self.shape, self.engine, self.learner, self.folder = shape, engine, learner, folder
        self.counts = Counts(shape)
        self.prompts: list[Prompt] = []
        self.turns: list[SampledTurn] = []
        self.samples: list[LearnerSample] = []
        self.published = learner.version
        # of the learner's versions, that the engine holds

    def round(self, number: int, phases: Sequence[str]) -> list[Row]:
        """One pass through all phases; those that nobody asked for run as far as others need them."""
        if self.learner.version > self.published:
            # What the last round learnt and did not publish.
            self._catch_up()
        rows = self.roll(number)
        self.samples = self._samples(number)
        if "rollout" not in phases:
            rows = []
        if "score" in phases:
            rows += self.score()
        if "agreement" in phases:
            rows += self.agreement()
        if "update" in phases or "publish" in phases:
            rows += self.update("update" in phases)
        if "publish" in phases:
            rows += self.publish()
        return rows

    def roll(self, number: int) -> list[Row]:
        """Prompts first, by one token each; then every member of every group, behind prompts that are in the cache."""
        shape, vocabulary = self.shape, self.shape.config.vocab_size
        self.prompts = [
            text_prompt(topical_ids(shape.prompt_tokens, vocabulary, seed=number * shape.num_groups + group))
            for group in range(shape.num_groups)
        ]
        policy = PolicyEngine(self.engine, version=self.engine.version)

        async def sample(num_members: int, num_tokens: int, attempt: int) -> list[SampledTurn]:
            sampling = SamplingParameters(temperature=1.0, max_new_tokens=num_tokens)
            return await asyncio.gather(
                *(
                    policy.sample(prompt, sampling, RolloutId(TASK, group, attempt, member))
                    for group, prompt in enumerate(self.prompts)
                    for member in range(num_members)
                )
            )

        try:
            prefill, _ = self._timed(lambda: asyncio.run(sample(1, 1, 2 * number)))
            decode, self.turns = self._timed(
                lambda: asyncio.run(sample(shape.group_size, shape.response_tokens, 2 * number + 1))
            )
        finally:
            policy.close()
        num_cached = sum(turn.num_cached_tokens for turn in self.turns)
        num_prompt, num_sampled = shape.num_groups * shape.prompt_tokens, sum(len(turn.ids) for turn in self.turns)
        note = f"{num_sampled:,} tokens; {num_cached / (shape.group_size * num_prompt):.0%} of prompts from the cache"
        return [
            Row("rollout: prefill", prefill, self.counts.prefill(), num_prompt),
            Row("rollout: decode", decode, self.counts.decode(), num_sampled, note=note),
        ]

    def score(self) -> list[Row]:
        """Every response by the engine's weights, with the likeliest tokens and as many chosen ones."""
        shape = self.shape
        scorer = Scorer(self.engine, str(self.engine.version))
        generator = np.random.default_rng(0)
        chosen = [generator.integers(shape.config.vocab_size, size=(len(turn.ids), shape.top_k)) for turn in self.turns]
        asked = [
            (self.prompts[number // shape.group_size], turn.ids, ids)
            for number, (turn, ids) in enumerate(zip(self.turns, chosen, strict=True))
        ]

        async def score() -> list:
            return await asyncio.gather(*(scorer.score(prompt, ids, own, shape.top_k) for prompt, ids, own in asked))

        try:
            seconds, scored = self._timed(lambda: asyncio.run(score()))
        finally:
            scorer.close()
        differences = np.concatenate([one.logprobs - turn.logprobs for one, turn in zip(scored, self.turns, strict=True)])
        note = f"mean difference from sampling {np.abs(differences).mean():.1e}"
        return [Row("score", seconds, self.counts.score(), sum(len(turn.ids) for turn in self.turns), note=note)]

    def agreement(self) -> list[Row]:
        """The learner's log-probabilities beside the engine's, its experts replayed and not."""
        rows = []
        for replays, name in ((True, "experts replayed"), (False, "experts live")):
            samples = [
                one if replays else dataclasses.replace(one, rollout=dataclasses.replace(one.rollout, routes=None))
                for one in self.samples
            ]
            seconds, found = self._timed(lambda samples=samples: self.learner.logprobs(samples))
            differences = np.abs(np.concatenate([own - one.rollout.logprobs for own, one in zip(found, samples, strict=True)]))
            note = f"abs(delta log p): mean {differences.mean():.2e}, largest {differences.max():.2e}"
            rows.append(Row(f"agreement: {name}", seconds, tokens=self.shape.update_tokens, note=note))
        return rows

    def update(self, is_told: bool) -> list[Row]:
        """One optimizer step over all rollouts."""
        seconds, (record,) = self._timed(lambda: self.learner.update(self.samples))
        if not is_told:
            return []
        note = f"{self.shape.update_tokens:,} tokens in about {self.shape.num_packs} packs; "
        note += f"gradient norm {record['gradient_norm']:.2g}"
        if "route_disagreement" in record:
            note += (
                f"; experts elsewhere: {record['route_disagreement']:.2%} of picks, {record['route_disagreement_tokens']:.1%} "
                "of tokens"
            )
        return [Row("update", seconds, self.counts.update(), self.shape.update_tokens, note=note)]

    def publish(self) -> list[Row]:
        """Whole and as deltas, in this process and through a file; the learner steps between."""
        policy = PolicyEngine(self.engine, version=self.engine.version)
        rows = []
        try:
            for is_whole in (True, False):
                for through_file in (False, True):
                    if self.learner.version == self.published:
                        self.learner.update(self.samples)
                    rows += self._publish(policy, is_whole, through_file)
        finally:
            policy.close()
        return rows

    def _publish(self, policy: PolicyEngine, is_whole: bool, through_file: bool) -> list[Row]:
        version, base = self.engine.version + 1, None if is_whole else self.engine.version
        name = f"publish: {'whole' if is_whole else 'deltas'}, {'file' if through_file else 'in process'}"
        change_seconds, changes = self._timed(lambda: self._changes(is_whole))
        num_bytes = sum(change.nbytes for change in changes.values())
        share = num_bytes / self.counts.whole_bytes()
        rows = [Row(f"{name}: {'gathered' if is_whole else 'told apart'}", change_seconds, moved_bytes=num_bytes)]
        if through_file:
            update = WeightUpdate(version, changes, base)
            seconds, path = self._timed(lambda: write_update(self.folder, update))
            rows.append(Row(f"{name}: written", seconds, moved_bytes=num_bytes))
            seconds, _ = self._timed(lambda: asyncio.run(policy.publish_file(path)))
            rows.append(Row(f"{name}: read and put", seconds, moved_bytes=num_bytes))
            path.unlink()
        else:
            seconds, _ = self._timed(lambda: asyncio.run(policy.publish(version, changes, base)))
            rows.append(Row(f"{name}: put", seconds, moved_bytes=num_bytes))
        self._must_hold_the_same()
        whole = sum(row.seconds for row in rows)
        return [*rows, Row(name, whole, moved_bytes=num_bytes, note=f"{share:.1%} of the whole's bytes")]

    def _changes(self, is_whole: bool) -> dict[str, Change]:
        if is_whole:
            return dict(self.learner.weights(is_whole=True))
        # The engine's weights are those that were published last, to the bit.
        old = dict(self.engine.runner.model.named_parameters())
        changes: dict[str, Change] = {}
        for name, tensor in self.learner.weights():
            changes |= changes_between({name: old[name].to(tensor.device)}, {name: tensor})
        return changes

    def _must_hold_the_same(self) -> None:
        held = dict(self.engine.runner.model.named_parameters())
        for name, tensor in self.learner.weights(is_whole=True):
            if not torch.equal(tensor.to(held[name].device), held[name]):
                raise Disagreement(f"{name}: the engine does not hold what was published")
        self.published = self.learner.version

    def _catch_up(self) -> None:
        policy = PolicyEngine(self.engine, version=self.engine.version)
        try:
            asyncio.run(policy.publish(self.engine.version + 1, self._changes(is_whole=True)))
        finally:
            policy.close()
        self._must_hold_the_same()

    def _samples(self, number: int) -> list[LearnerSample]:
        size = self.shape.group_size
        groups = [self.turns[start : start + size] for start in range(0, len(self.turns), size)]
        return [
            sample
            for group, (prompt, turns) in enumerate(zip(self.prompts, groups, strict=True))
            for sample in samples_of(prompt, turns, RolloutId(TASK, group, number, 0))
        ]

    def _timed(self, work: Callable[[], Result]) -> tuple[float, Result]:
        self._synchronize()
        start = time.perf_counter()
        result = work()
        self._synchronize()
        return time.perf_counter() - start, result

    def _synchronize(self) -> None:
        for device in {self.engine.device, self.learner.ranks.device}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


@contextmanager
def opened_step(shape: StepShape, devices: tuple[torch.device, torch.device], folder: Path) -> Iterator[Step]:
    """devices: of the engine and of the learner."""
    engine_device, learner_device = devices
    is_gpu = engine_device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    if is_gpu:
        torch.cuda.set_device(engine_device)
    write_random_model(folder / "model", shape.config, str(engine_device), dtype)
    config = EngineConfig(
        page_size=shape.page_size,
        cache_tokens=shape.cache_tokens,
        prefill_chunk_tokens=shape.chunk_tokens,
        max_batch_requests=shape.num_rollouts,
        records_routes=True,
    )
    engine = Engine(folder / "model", engine_device, dtype, config=config)
    learner_config = LearnerConfig(
        model_dir=str(folder / "model"),
        run_dir=str(folder / "run"),
        tokens_per_pack=shape.tokens_per_pack,
        emulates_e4m3=is_gpu,
    )
    with opened_learner(learner_config, ALGORITHM, learner_device) as learner:
        yield Step(shape, engine, learner, folder / "updates")


def measure(options: argparse.Namespace) -> list[str]:
    """The whole report, line by line."""
    device = torch.device(options.device)
    devices = device, torch.device(options.learner_device or options.device)
    if device.type != "cuda" and not options.tiny:
        raise InputError("the 30B shape needs a GPU; --tiny runs on a CPU")
    config = shape_tiny() if options.tiny else shape_30b()
    shape = StepShape(
        dataclasses.replace(config, num_hidden_layers=options.layers, vision=None),
        options.groups,
        options.group_size,
        options.prompt,
        options.response,
        options.pack,
        options.chunk,
        options.top_k,
        page_size=16 if options.tiny else 64,
        element_bytes=2 if device.type == "cuda" else 4,
    )
    machine = Machine()
    where = header() if device.type == "cuda" else "CPU, float32"
    size = "a tiny shape" if options.tiny else "the 30B shape"
    title = f"### A step of reinforcement learning, {options.layers} layers of {size}"
    batch = f"{shape.num_groups} groups of {shape.group_size}, prompts of {shape.prompt_tokens:,} and responses of "
    batch += f"{shape.response_tokens:,} tokens."
    lines = [title, "", f"{where}. {batch}", "", *count_memory(shape, devices), ""]
    print("\n".join(lines), flush=True)
    parent = Path(options.folder) if options.folder else Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        check_disk(Path(name), Counts(shape))
        with opened_step(shape, devices, Path(name)) as step:
            # Compiles and captures whatever the second round needs.
            step.round(0, options.only)
            for one in {one for one in devices if one.type == "cuda"}:
                torch.cuda.reset_peak_memory_stats(one)
            rows = step.round(1, options.only)
    told = [TABLE, *(row.line(machine) for row in rows), ""]
    if device.type == "cuda":
        peaks = (f"{torch.cuda.max_memory_allocated(one) / GB:.1f} GB on {one}" for one in sorted(set(devices), key=str))
        told += [f"Most memory at a time: {', '.join(peaks)}.", ""]
    told += published_table()
    print("\n".join(told), flush=True)
    return lines + told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=None, help="4; 2 of the tiny shape")
    parser.add_argument("--groups", type=int, default=None)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=None, help="tokens")
    parser.add_argument("--response", type=int, default=None, help="tokens")
    parser.add_argument("--pack", type=int, default=None, help="tokens of one pass of the learner")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens of one batch of the engine")
    parser.add_argument("--top-k", type=int, default=64, help="likeliest tokens that the scorer returns")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learner-device", default=None, help="another GPU for the learner")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--folder", default=None, help="where the checkpoint and publications lie; /dev/shm where there is one")
    parser.add_argument("--append", action="store_true", help="also append the report to benchmarks/results.md")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU")
    options = parser.parse_args(arguments)
    sizes = {"layers": (4, 2), "groups": (16, 2), "group_size": (8, 2), "prompt": (2048, 40), "response": (512, 8)}
    for name, (full, tiny) in {**sizes, "pack": (8192, 128)}.items():
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.tiny else full)
    try:
        lines = measure(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.append:
        with RESULTS.open("a") as file:
            file.write("\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
