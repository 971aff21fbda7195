"""Rollouts over the toy network of `tests.train.toy_runs`, without an engine: groups of answers behind prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openkeye.data.document import Document, PixelPictures
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.rollout import Rollout, RolloutId
from tests.train.toy_runs import IMAGE, TOY, VOCABULARY


def toy_rollout(
    group: int, member: int, num_prompt: int = 6, num_output: int | None = None, has_picture: bool = False
) -> Rollout:
    """A rollout of random tokens; prompts of a group are the same."""
    prompt_rng, rng = np.random.default_rng([1, group]), np.random.default_rng([2, group, member])
    prompt = prompt_rng.integers(10, VOCABULARY, num_prompt)
    if has_picture:
        prompt[:2] = IMAGE
    length = int(rng.integers(3, 12)) if num_output is None else num_output
    return Rollout(
        id=RolloutId("toy", group, group, member),
        prompt_ids=prompt.astype(np.int32),
        output_ids=rng.integers(10, VOCABULARY, length).astype(np.int32),
        is_policy=np.ones(length, dtype=bool),
        logprobs=-rng.uniform(2.5, 4.5, length).astype(np.float32),
        versions=np.zeros(length, dtype=np.int32),
        rewards={"outcome": float(rng.random()), "format": 1.0},
    )


def toy_document(rollout: Rollout) -> Document:
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.output_ids]).astype(np.int64))
    is_media = (ids == IMAGE) & (torch.arange(len(ids)) < len(rollout.prompt_ids))
    pictures: tuple[PixelPictures, ...] = ()
    if num_media := int(is_media.sum()):
        pixels = np.random.default_rng([3, rollout.id.group]).integers(0, 256, (1, 28, 28 * num_media, 3), dtype=np.uint8)
        pictures = (PixelPictures([pixels]),)
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    return Document(str(rollout.id), ids, torch.arange(len(ids)).expand(3, -1).clone(), nothing, is_media, pictures)


def toy_group(group: int, size: int = 4, algorithm: AlgorithmConfig | None = None, **changes: Any) -> list[LearnerSample]:
    """A group to learn from, with whatever streams the algorithm makes of its rewards."""
    rollouts = [toy_rollout(group, member, **changes) for member in range(size)]
    return samples_of(rollouts, algorithm or AlgorithmConfig())


def samples_of(rollouts: Sequence[Rollout], algorithm: AlgorithmConfig) -> list[LearnerSample]:
    streams = streams_of(rollouts, algorithm)
    assert streams is not None
    return [LearnerSample(toy_document(one), one, its) for one, its in zip(rollouts, streams, strict=True)]


def with_routes(sample: LearnerSample, seed: int, live_share: float = 0.2) -> LearnerSample:
    """Random experts for each token, a share of them unknown; of a group's prompt the same in every member."""
    rollout = sample.rollout
    num_prompt = len(rollout.prompt_ids) - 1

    def draw(rng: np.random.Generator, length: int) -> np.ndarray:
        orders = rng.random((length, TOY.num_hidden_layers, TOY.num_experts)).argsort(axis=-1)
        drawn = orders[..., : TOY.num_experts_per_tok].astype(np.int16)
        drawn[rng.random(drawn.shape[:2]) < live_share] = -1
        return drawn

    shared = draw(np.random.default_rng([4, seed, rollout.id.group]), num_prompt)
    own = draw(np.random.default_rng([5, seed, rollout.id.group, rollout.id.member]), len(rollout.output_ids) + 1)
    return replace(sample, rollout=replace(rollout, routes=np.concatenate([shared, own])))


def toy_config(folder: Path, **changes: Any) -> LearnerConfig:
    """Over a folder that `write_toy_model` has written a model to."""
    config = LearnerConfig(str(folder / "model"), str(folder / "policy"), rate=1e-3, tokens_per_pack=96)
    return replace(config, **changes)
