"""The keys that answering selected, and those that the learner selects for the same tokens."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.recorded_answer import Picks
from openkeye.rl.advantage import streams_of
from openkeye.rl.config import AlgorithmConfig, LearnerConfig
from openkeye.rl.context_rl import RecoverySettings
from openkeye.rl.episode import EpisodeInterrupted, run_episode
from openkeye.rl.groups import GroupBook
from openkeye.rl.journal import Journal
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.policy_engine import PolicyEngine, lay_out_prompt
from openkeye.rl.policy_model import num_repicked
from openkeye.rl.roles import RolloutOrder
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.rollout_document import rollout_document
from tests.rl.test_agreement import QUESTIONS, clip
from tests.rl.toy_world import ToyEnvironment, ToyTask
from tests.train.toy_runs import CPU

NUM_MEMBERS, EVERY = 3, 4


@pytest.fixture(scope="module")
def samples() -> list[LearnerSample]:
    """Answers about a clip, a share of whose tokens tell what they selected."""
    engine = Engine("openkeye-tiny", device="cpu", config=EngineConfig(records_picks_every=EVERY))
    content = [{"type": "video", "video": clip()}, {"type": "text", "text": QUESTIONS[0]}]
    prompt = lay_out_prompt([{"role": "user", "content": content}], engine.processor)
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=16)
    policy = PolicyEngine(engine)

    async def sampled() -> list[Rollout]:
        ids = [RolloutId("asked", 0, 0, member) for member in range(NUM_MEMBERS)]
        turns = await asyncio.gather(*(policy.sample(prompt, sampling, id) for id in ids))
        prompt_ids = prompt.model_input.input_ids.numpy().astype(np.int32)
        return [
            Rollout(
                id,
                prompt_ids,
                turn.ids,
                np.ones(len(turn.ids), dtype=bool),
                turn.logprobs,
                turn.versions,
                rewards={"outcome": float(id.member)},
                picks=turn.picks,
            )
            for id, turn in zip(ids, turns, strict=True)
        ]

    try:
        rollouts = asyncio.run(sampled())
    finally:
        policy.close()
    streams = streams_of(rollouts, AlgorithmConfig())
    assert streams is not None
    return [LearnerSample(rollout_document(prompt, one), one, its) for one, its in zip(rollouts, streams, strict=True)]


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    config = LearnerConfig("openkeye-tiny", str(tmp_path / "learner"), tokens_per_pack=4096, rate=1e-5)
    with opened_learner(config, AlgorithmConfig(), CPU) as learner:
        yield learner


def test_a_share_of_the_tokens_tells_what_it_selected(samples: list[LearnerSample], learner: Learner):
    top_k, num_layers = learner.model_config.indexer.top_k, learner.model_config.num_hidden_layers
    total = 0
    for sample in samples:
        rollout, picks = sample.rollout, sample.rollout.picks
        assert picks is not None and picks.keys_NLK.dtype == picks.places_N.dtype == np.int32
        assert picks.keys_NLK.shape == (len(picks.places_N), num_layers, top_k)
        # Tokens that chose one of the answer's, and saw more keys than they could take.
        first, end = len(rollout.prompt_ids) - 1, len(rollout.prompt_ids) + len(rollout.output_ids) - 1
        assert first > top_k and (picks.places_N >= first).all() and (picks.places_N < end).all()
        assert (np.diff(picks.places_N) > 0).all() and (np.diff(picks.keys_NLK) > 0).all() and (picks.keys_NLK >= 0).all()
        assert (picks.keys_NLK[:, :, -1] <= picks.places_N[:, None]).all()
        total += len(picks.places_N)
    assert 0 < total <= sum(len(one.rollout.output_ids) for one in samples) / 2


@pytest.mark.parametrize("joins", [True, False])
def test_the_same_weights_select_the_same_keys(samples: list[LearnerSample], learner: Learner, joins: bool):
    learner.config = replace(learner.config, joins_groups=joins)
    record = learner.step(samples)
    assert record["index_disagreement"] == record["index_disagreement_tokens"] == 0


def test_other_weights_select_others(samples: list[LearnerSample], learner: Learner):
    rng = torch.Generator().manual_seed(1)
    for name, parameter in learner.keye.named_parameters():
        if "indexer" in name and name.endswith("weight"):
            own = parameter.data.to_local()  # type: ignore[attr-defined]
            own += 0.05 * own.std() * torch.randn(own.shape, generator=rng)
    record = learner.step(samples)
    assert 0 < float(record["index_disagreement"]) < float(record["index_disagreement_tokens"]) <= 1


def test_keys_are_compared_as_sets_and_what_is_missing_counts_for_nothing():
    given = torch.tensor([[[-1, 2, 5], [1, 2, 3]], [[0, 1, 2], [7, 8, 9]]], dtype=torch.int32)
    own = {0: torch.tensor([[5, -1, 2], [3, 4, 1]]), 1: torch.tensor([[2, 1, 0], [7, 8, 9]])}
    found = num_repicked(own, given)
    assert found is not None and found.tolist() == [1, 1]
    assert num_repicked({}, given) is num_repicked(own, None) is None


def test_picks_come_back_from_the_journal(tmp_path: Path, samples: list[LearnerSample]):
    book = GroupBook(Journal(tmp_path), False, RecoverySettings())
    book.record("opened", {"group": 0, "task": "asked", "number": 0, "size": NUM_MEMBERS})
    for sample in samples:
        book.record_finished(RolloutOrder(sample.rollout.id), sample.rollout)
    for (_, scored), sample in zip(book.usable(book.groups[0]), samples, strict=True):
        found, expected = scored.rollout.picks, sample.rollout.picks
        assert found is not None and expected is not None
        assert np.array_equal(found.places_N, expected.places_N) and np.array_equal(found.keys_NLK, expected.keys_NLK)


def test_episodes_keep_the_picks_of_all_turns_and_of_interrupted_ones():
    task = ToyTask(ToyEnvironment(3))
    example = task.read(0)
    config = EngineConfig(records_picks_every=1, dense_up_to=0)
    policy = PolicyEngine(engine := Engine("openkeye-tiny", device="cpu", config=config))
    # Selecting shows already in a short conversation.
    engine.runner.model.config = replace(
        engine.runner.model.config, indexer=replace(engine.runner.model.config.indexer, top_k=8)
    )

    async def play(interrupts: bool) -> Rollout:
        played = asyncio.create_task(run_episode(policy, task, example, RolloutId("toy", 0, 0, 0)))
        if interrupts:
            while not engine.scheduler.running or len(engine.scheduler.running[0].output_ids) < 4:
                await asyncio.sleep(0.002)
            await policy.interrupt()
            with pytest.raises(EpisodeInterrupted) as caught:
                await played
            state = caught.value.state
            return await run_episode(policy, task, example, RolloutId("toy", 0, 0, 0), state=state)
        return await played

    try:
        whole, resumed = asyncio.run(play(False)), asyncio.run(play(True))
    finally:
        policy.close()
    for rollout in (whole, resumed):
        assert rollout.picks is not None
        chosen = len(rollout.prompt_ids) - 1 + np.flatnonzero(rollout.is_policy)
        assert np.array_equal(rollout.picks.places_N, chosen)


def test_picks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="picks of"):
        Picks(np.zeros(2, np.int32), np.zeros((3, 1, 1), np.int32))
