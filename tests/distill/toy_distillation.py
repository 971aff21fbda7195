"""A whole distillation in one process over networks of two layers: a policy that samples, a learner that steps, two domains.

Prompts are numbers, and the first one tells the domain. Messages hold them as text, "1 12 3".
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openkeye.data.packed_batch import pack
from openkeye.distill.alignment import TokenizerIdentity
from openkeye.distill.config import DistillConfig, DistillRun
from openkeye.distill.divergence import NO_TOKEN, full_kl
from openkeye.distill.loop import DistillParts
from openkeye.distill.scored import ModelScorer, Scored, prompt_document, response_hidden
from openkeye.distill.streams import Record, SupportDivergence
from openkeye.distill.teachers import ModelSeat, TeacherPool
from openkeye.inputs.prompt import Prompt
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import load_model, save_model
from openkeye.rl.rollout import Rollout, RolloutId, TokenStreams
from openkeye.tasks.task import Example, Response
from openkeye.train.packed_past import PackedPast
from tests.distill.toy_teachers import text_prompt, write_model
from tests.train.toy_runs import VOCABULARY

LENGTH = 6
# tokens of a response
FIRST_TOKENS = {"maths": 1, "code": 2}
ATTENTION = "dense"
# half the time of sparse, and nothing here is about it
read_with = partial(ModelScorer, attention=ATTENTION)


@dataclass(frozen=True)
class ToyTask:
    """Prompts of three tokens."""

    name: str
    num_examples: int | None = None

    def read(self, number: int) -> Example:
        """See `Task.read`."""
        rest = np.random.default_rng([FIRST_TOKENS[self.name], number]).integers(10, VOCABULARY, 2)
        content = " ".join(map(str, (FIRST_TOKENS[self.name], *rest)))
        return Example(self.name, number, "text", ({"role": "user", "content": content},))

    async def score(self, example: Example, response: Response) -> dict[str, float]:
        """Nobody asks."""
        raise AssertionError("distillation needs no rewards")


class ToyReader:
    """Reads numbers."""

    def __init__(self, vocabulary: str = "numbers", opening: tuple[int, ...] = ()) -> None:
        self.identity = TokenizerIdentity(vocabulary, "none")
        self._opening = opening
        # what this model's template writes before a prompt

    async def read(self, example: Example) -> Prompt:
        """See `PromptReader.read`."""
        return text_prompt(*self._opening, *map(int, example.messages[0]["content"].split()))


@dataclass(frozen=True)
class ToySample:
    """What the learner takes."""

    document: Any
    rollout: Rollout
    streams: TokenStreams


def run_pack(model: KeyeModel, documents: Sequence[Any]) -> tuple[Tensor, Any]:
    """([T, D] hidden states, the batch) of documents of text."""
    batch = pack(documents)
    past = PackedPast(batch.layout, model.config.indexer.top_k, ATTENTION)
    return model(model.model.embed_tokens(batch.input_ids), batch.position_ids, past), batch


class ToyPolicy:
    """Samples for everybody who asks at the same moment."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.model = load_model(folder)
        self.version = -1
        self._generator = torch.Generator().manual_seed(seed)
        self._asked: list[tuple[Example, RolloutId, asyncio.Future[Rollout]]] = []

    async def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Policy.publish`."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.version = version

    async def roll(self, example: Example, id: RolloutId) -> Rollout:
        """See `Policy.roll`."""
        answer: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()
        self._asked.append((example, id, answer))
        if len(self._asked) == 1:
            asyncio.get_running_loop().call_soon(self._sample)
        return await answer

    @torch.no_grad()
    def _sample(self) -> None:
        asked, self._asked = self._asked, []
        prompts = [text_prompt(*map(int, example.messages[0]["content"].split())) for example, _, _ in asked]
        outputs: list[list[int]] = [[] for _ in asked]
        logprobs: list[list[float]] = [[] for _ in asked]
        for _ in range(LENGTH):
            documents = [prompt_document(prompt, ids) for prompt, ids in zip(prompts, outputs, strict=True)]
            hidden, batch = run_pack(self.model, documents)
            last = [span.end - 1 for span in batch.layout.spans]
            log = self.model.logits(hidden[last]).log_softmax(dim=-1)
            tokens = torch.multinomial(log.exp(), 1, generator=self._generator)
            for ids, values, token, value in zip(outputs, logprobs, tokens, log.gather(1, tokens), strict=True):
                ids.append(int(token))
                values.append(float(value))
        for (_, id, answer), prompt, ids, values in zip(asked, prompts, outputs, logprobs, strict=True):
            answer.set_result(
                Rollout(
                    id,
                    prompt.model_input.input_ids.numpy().astype(np.int32),
                    np.array(ids, np.int32),
                    np.ones(LENGTH, bool),
                    np.array(values, np.float32),
                    np.full(LENGTH, self.version, np.int32),
                )
            )


class ToyStudentScorer:
    """Reads with the policy's network."""

    def __init__(self, policy: ToyPolicy) -> None:
        self._policy = policy

    async def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `StudentScorer.score`."""
        return read_with(self._policy.model).score(prompt, output_ids, chosen_ids, top_k)


class ToyLearner:
    """Adam over streams, with the sums and counts that `TokenStreams` tells of."""

    def __init__(self, folder: Path, divergence: SupportDivergence, rate: float = 3e-3) -> None:
        self.model = load_model(folder).requires_grad_()
        self.version = 0
        self.num_saves = 0
        self._divergence = divergence
        self._optimizer = torch.optim.Adam([p for n, p in self.model.named_parameters() if "indexer" not in n], rate)

    def step(self, samples: Sequence[ToySample]) -> Record:
        """See `Learner.step`."""
        hidden, batch = run_pack(self.model, [sample.document for sample in samples])
        log = self.model.logits(hidden[batch.learnt_positions]).log_softmax(dim=-1)

        def stream(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(sample.streams, name) for sample in samples]))

        ids, given = stream("support_ids").long(), stream("support_logprobs")
        student = log.gather(1, ids.clamp(min=0)).masked_fill(ids == NO_TOKEN, 0.0)
        own = student[:, 0]
        tokens = SimpleNamespace(logprobs=own, rollout=own.detach(), ref_logprobs=stream("ref_logprobs"))
        losses, _ = self._divergence(tokens, SimpleNamespace(student=student, teacher=given, ids=ids))
        weights, rl_weights = stream("ref_kl_weights"), stream("rl_weights")
        ref = (weights * losses).sum() / max(1, int((weights != 0).sum()))
        ratio = (own - own.detach()).exp()
        rl = -(rl_weights * stream("advantages") * ratio).sum() / max(1, int((rl_weights != 0).sum()))
        self._optimizer.zero_grad()
        (ref + rl).backward()
        self._optimizer.step()
        self.version += 1
        return {"loss/ref_kl": float(ref.detach()), "loss/rl": float(rl.detach())}

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """See `Learner.weights`."""
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def save(self) -> None:
        """Counted only."""
        self.num_saves += 1

    def write_model(self, out_dir: Path) -> None:
        """See `Learner.write_model`."""
        save_model(self.model, out_dir)


def write_toys(folder: Path) -> dict[str, str]:
    """A student and two teachers of its kind that were never near each other; folders by name."""
    seeds = {"student": 1, "maths": 2, "code": 3}
    return {name: str(write_model(folder / name, seed)) for name, seed in seeds.items()}


def toy_run(folder: Path, folders: dict[str, str], distill: DistillConfig | None = None, **changes: Any) -> DistillRun:
    """Two domains, a teacher each."""
    teachers = {name: folders[name] for name in FIRST_TOKENS}
    config = distill or DistillConfig(teachers, {f"text/{name}": name for name in teachers})
    run = DistillRun(
        model_dir=folders["student"],
        run_dir=str(folder / "run"),
        out_dir=str(folder / "out"),
        distill=config,
        tasks=dict.fromkeys(FIRST_TOKENS, 1.0),
        num_steps=4,
        opens="tests.distill.toy_distillation:open_toys",
        rollouts_per_step=24,
    )
    return replace(run, **changes)


def open_toys(run: DistillRun) -> DistillParts:
    """What `DistillRun.opens` names."""
    config = run.distill
    policy = ToyPolicy(Path(run.model_dir), run.seed)
    return DistillParts(
        policy=policy,
        student=ToyStudentScorer(policy),
        learner=ToyLearner(Path(run.model_dir), SupportDivergence(config.estimator), **run.learner),
        pool=TeacherPool(config.teachers, ModelSeat(config.base_dir or None, make_scorer=read_with), config.cache_bytes),
        student_reader=ToyReader(),
        teacher_readers={name: ToyReader() for name in config.teachers},
        tasks={name: ToyTask(name) for name in FIRST_TOKENS},
        tokenizer=None,
        vocab_size=VOCABULARY,
        make_sample=ToySample,
    )


@torch.no_grad()
def whole_kl(policy: ToyPolicy, teacher: KeyeModel, task: ToyTask, num_examples: int = 24) -> float:
    """Mean exact KL(student || teacher) over places of the student's own responses to held-out examples."""

    async def sample() -> list[Rollout]:
        ids = [RolloutId(task.name, number, 0, number) for number in range(num_examples)]
        return await asyncio.gather(*(policy.roll(task.read(10**6 + id.number), id) for id in ids))

    policy._generator.manual_seed(99)
    sums = []
    for rollout in asyncio.run(sample()):
        prompt = text_prompt(*rollout.prompt_ids.tolist())
        document = prompt_document(prompt, rollout.output_ids)
        own, given = (response_hidden(model, document, prompt.num_tokens, ATTENTION) for model in (policy.model, teacher))
        sums.append(full_kl(own, policy.model.lm_head.weight, given, teacher.lm_head.weight).mean())
    return float(torch.stack(sums).mean())
