"""What the engine says of the tokens that it samples, and what the learner says of the same: one policy, to a millionth.

On a CPU in float32, with sparse attention that has to choose, a clip in the prompt, groups that share its prefix in the
engine's cache and in the learner's packs, and routes that are replayed or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openkeye.data.document import Document, PixelPictures
from openkeye.engine.batch import Batch
from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import TokenEvent
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.scene import make_scene
from openkeye.inputs.video import Frames
from openkeye.kernels.reference import route
from openkeye.model.experts import MixtureOfExperts
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.rollout import Rollout, RolloutId
from tests.train.toy_runs import CPU

NUM_MEMBERS = 3
QUESTIONS = (
    "When does the yellow digit 0 appear?",
    "At what times can the pink cross be seen?",
    "What word is shown at 1.5 seconds?",
)
SAMPLING = SamplingParameters(temperature=1.0, logprobs=0, max_new_tokens=24)


def clip() -> Frames:
    times = np.arange(14) / 2
    scene = make_scene(np.random.default_rng(3), 0.0, 7.0)
    return Frames(render(scene_job(scene, times), 112, CPU).numpy(), times.tolist(), "drawn", 7.0)


class RouteRecorder:
    """Sees where the engine's batches send their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.routes = engine, {}
        self._run = engine.runner.run
        engine.runner.run = self.run  # type: ignore[method-assign]
        self._chosen: list[torch.Tensor] = []
        self.mixtures = [part for part in engine.runner.model.modules() if isinstance(part, MixtureOfExperts)]
        for mixture in self.mixtures:
            mixture.gate.register_forward_hook(self._see)

    def _see(self, _: Any, __: Any, logits: torch.Tensor) -> None:
        self._chosen.append(route(logits, self.mixtures[0].num_experts_per_tok, True)[1])

    def run(self, batch: Batch) -> torch.Tensor:
        self._chosen = []
        logits = self._run(batch)
        rows = torch.stack(self._chosen, dim=1).numpy()
        start = 0
        for segment in batch.segments:
            for number in range(segment.count):
                self.routes[id(segment.request), segment.start + number] = rows[start + number]
            start += segment.count
        return logits

    def of(self, request: Request, length: int) -> np.ndarray:
        """[tokens, L, K]; -1 of those that another request computed."""
        unknown = np.full((len(self.mixtures), self.mixtures[0].num_experts_per_tok), -1)
        return np.stack([self.routes.get((id(request), token), unknown) for token in range(length)]).astype(np.int16)


def sample_group(
    engine: Engine, recorder: RouteRecorder, messages: Sequence[dict], group: int
) -> list[tuple[Rollout, Document]]:
    requests, told = [], []
    for member in range(NUM_MEMBERS):
        request = engine.prepare(messages, replace(SAMPLING, seed=10 * group + member))
        events: list[TokenEvent] = []
        request.on_token = events.append
        requests.append(request)
        told.append(events)
    engine.scheduler.add(requests[0])
    engine.step()
    for request in requests[1:]:
        # The first one's prompt stands in the prefix cache by now.
        engine.scheduler.add(request)
    while engine.scheduler.has_work:
        engine.step()
    assert (requests[1].num_cached > 0) == (requests[1].num_prompt > engine.config.page_size)
    return [
        made(request, events, recorder, RolloutId("asked", group, group, member))
        for member, (request, events) in enumerate(zip(requests, told, strict=True))
    ]


def made(request: Request, events: list[TokenEvent], recorder: RouteRecorder, own_id: RolloutId) -> tuple[Rollout, Document]:
    """The rollout of a finished request, and its document."""
    prompt, ids = request.prompt, np.array([event.token_id for event in events], dtype=np.int32)
    assert len(ids) and ids.tolist() == request.output_ids
    rollout = Rollout(
        id=own_id,
        prompt_ids=prompt.model_input.input_ids.numpy().astype(np.int32),
        output_ids=ids,
        is_policy=np.ones(len(ids), dtype=bool),
        logprobs=np.array([event.logprob for event in events], dtype=np.float32),
        versions=np.zeros(len(ids), dtype=np.int32),
        routes=recorder.of(request, prompt.num_tokens + len(ids)),
        rewards={"outcome": own_id.member % 2},
    )
    length = prompt.num_tokens + len(ids)
    positions = prompt.model_input.position_ids
    behind = positions.max() + 1 + torch.arange(len(ids))
    is_media = torch.zeros(length, dtype=torch.bool)
    for picture in prompt.pictures:
        is_media[picture.first_token : picture.end_token] = True
    pictures = [item.pixels for item in prompt.media if isinstance(item, Frames)]
    document = Document(
        name=str(own_id),
        input_ids=torch.cat([prompt.model_input.input_ids, torch.from_numpy(ids).long()]),
        position_ids=torch.cat([positions, behind.expand(3, -1)], dim=1),
        is_learnt=torch.zeros(length, dtype=torch.bool),
        is_media=is_media,
        pictures=(PixelPictures(pictures),) if pictures else (),
    )
    return rollout, document


@pytest.fixture(scope="module")
def samples() -> list[LearnerSample]:
    engine = Engine("openkeye-tiny", device="cpu")
    recorder = RouteRecorder(engine)
    asked = [[{"type": "video", "video": clip()}, {"type": "text", "text": question}] for question in QUESTIONS]
    contents = [*asked, "Where is Paris?"]
    groups = [
        sample_group(engine, recorder, [{"role": "user", "content": content}], group) for group, content in enumerate(contents)
    ]
    found = []
    for group in groups:
        streams = streams_of([rollout for rollout, _ in group], AlgorithmConfig())
        assert streams is not None
        found += [LearnerSample(document, rollout, its) for (rollout, document), its in zip(group, streams, strict=True)]
    return found


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    config = LearnerConfig("openkeye-tiny", str(tmp_path_factory.mktemp("agreement")), tokens_per_pack=4096, rate=1e-5)
    with opened_learner(config, AlgorithmConfig(), CPU) as learner:
        yield learner


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("joins", [True, False])
def test_trainer_and_rollouts_agree(learner: Learner, samples: list[LearnerSample], replays: bool, joins: bool):
    learner.config = replace(learner.config, replays_routes=replays, joins_groups=joins)
    differences = np.concatenate(
        [own - sample.rollout.logprobs for own, sample in zip(learner.logprobs(samples), samples, strict=True)]
    )
    # The clip's prompt alone is longer than what attention selects.
    assert samples[0].num_prompt > 1.2 * learner.model_config.indexer.top_k and len(differences) > 80
    print(f"mean {np.abs(differences).mean():.2e}, largest {np.abs(differences).max():.2e} of {len(differences)}")
    assert np.abs(differences).mean() <= 1e-6
    assert np.abs(differences).max() <= 2e-5


def test_other_routes_are_another_policy(learner: Learner, samples: list[LearnerSample]):
    learner.config = replace(learner.config, replays_routes=True, joins_groups=True)
    moved = []
    for one in samples:
        routes = one.rollout.routes
        assert routes is not None
        elsewhere = np.where(routes >= 0, (routes + 1) % learner.model_config.num_experts, -1).astype(np.int16)
        moved.append(replace(one, rollout=replace(one.rollout, routes=elsewhere)))
    found = learner.logprobs(moved)
    assert np.concatenate([abs(own - one.rollout.logprobs) for own, one in zip(found, samples, strict=True)]).mean() > 0.1


def test_the_step_tells_of_the_agreement(learner: Learner, samples: list[LearnerSample]):
    learner.config = replace(learner.config, replays_routes=True, joins_groups=True)
    record = learner.step(samples)
    assert record["mismatch/mean_abs"] <= 1e-6 and record["mismatch/k3"] <= 1e-9
    assert record["route_disagreement"] <= 1e-3 and record["effective_sample_size"] == pytest.approx(1)
    assert record["clip_low_share"] == record["clip_high_share"] == record["masked_share"] == 0
    # What is published now is another policy.
    assert (
        max(abs(own - one.rollout.logprobs).max() for own, one in zip(learner.logprobs(samples), samples, strict=True)) > 1e-4
    )


def test_weights_are_published_under_the_names_of_the_checkpoint(learner: Learner):
    engine = Engine("openkeye-tiny", device="cpu")
    names = {name for name, _ in engine.runner.model.named_parameters()}
    assert {name for name, _ in learner.weights(is_whole=True)} == names
    assert Path(learner.config.run_dir).is_dir()
