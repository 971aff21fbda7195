"""Learning reads what the engine saw: a learner's pass over the document gives the log-probabilities that were sampled."""

import asyncio

import numpy as np
import pytest
import torch

from openkeye.data.document import PixelPictures
from openkeye.data.packed_batch import pack
from openkeye.engine.config import SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.model.weights import load_model
from openkeye.rl.episode import run_episode
from openkeye.rl.policy_engine import lay_out_prompt
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.rollout_document import DrawnClip, group_document, rollout_document
from openkeye.tasks.drawn_frames import PICTURES
from openkeye.tasks.registry import open_task
from openkeye.train.packed_past import PackedPast
from tests.engine.test_loop import QUESTIONS, chat
from tests.rl.test_policy_engine import with_policy
from tests.rl.toy_world import ToyEnvironment, ToyTask

SAMPLING = SamplingParameters(temperature=1.0)


@pytest.fixture(scope="module")
def group(video):
    """A prompt with a video, and three episodes behind it."""
    engine = Engine()
    task = ToyTask(ToyEnvironment(2, opening=tuple(chat(video, QUESTIONS[0]))))

    async def work(policy):
        prompt = await policy.lay_out(task.environment.opening)
        ids = [RolloutId("toy", 0, 0, member) for member in range(3)]
        episodes = (run_episode(policy, task, task.read(0), id, sampling=SAMPLING, prompt=prompt) for id in ids)
        return prompt, await asyncio.gather(*episodes)

    return with_policy(engine, work)


@torch.inference_mode()
def learner_logprobs(document) -> torch.Tensor:
    """[n] of the document's labelled tokens, by the network that learns."""
    model = load_model(Engine().model_dir, "cpu", torch.float32)
    batch = pack([document])
    vectors = model.encode_patches(batch.patches())
    embeds = model.embed_at(batch.input_ids, batch.media_positions, vectors)
    hidden = model(embeds, batch.position_ids, PackedPast(batch.layout, model.config.indexer.top_k, "sparse"))
    rows = model.logits(hidden[batch.learnt_positions]).log_softmax(-1)
    return rows.gather(1, batch.labels[batch.learnt_positions][:, None])[:, 0]


def test_a_learner_finds_the_sampled_logprobs(group):
    prompt, rollouts = group
    for rollout in rollouts:
        document = rollout_document(prompt, rollout)
        assert document.input_ids.tolist() == [*rollout.prompt_ids.tolist(), *rollout.output_ids.tolist()]
        assert document.num_learnt == rollout.num_policy_tokens and document.task == "toy"
        difference = learner_logprobs(document).numpy() - rollout.logprobs[rollout.is_policy]
        assert np.abs(difference).mean() <= 1e-6, np.abs(difference).mean()


def test_a_group_behind_one_prompt_says_the_same(group):
    prompt, rollouts = group
    document = group_document(prompt, rollouts)
    assert document.num_tokens == prompt.num_tokens - 1 + sum(1 + len(rollout.output_ids) for rollout in rollouts)
    for first, rollout in zip(document.branches, rollouts, strict=True):
        assert (document.input_ids[first + 1 : first + 1 + len(rollout.output_ids)].numpy() == rollout.output_ids).all()
    sampled = np.concatenate([rollout.logprobs[rollout.is_policy] for rollout in rollouts])
    assert document.num_learnt == len(sampled)
    difference = np.abs(learner_logprobs(document).numpy() - sampled)
    assert difference.mean() <= 1e-6, difference.mean()


def test_pixels_are_the_engines_own(group, video):
    prompt, rollouts = group
    (pictures,) = rollout_document(prompt, rollouts[0]).pictures
    assert (pictures.pixels[0] == video.pixels).all() and pictures.pixels[0].dtype == np.uint8


def test_another_prompt_is_refused(group):
    prompt, rollouts = group
    other = lay_out_prompt([{"role": "user", "content": "Hello"}], Engine().processor)
    empty = np.zeros(0)
    nothing = Rollout(rollouts[0].id, rollouts[0].prompt_ids, empty, empty.astype(bool), empty, empty)
    for document in (rollout_document, lambda prompt, rollout: group_document(prompt, [rollout])):
        with pytest.raises(ValueError, match="other ids than the one given"):
            document(other, rollouts[0])
        with pytest.raises(ValueError, match="nothing to learn"):
            document(prompt, nothing)


def test_a_clip_of_a_gpu_is_drawn_there_again_and_read_from_the_host_elsewhere():
    frames = open_task("frameforge_counting", {}).read(3).messages[0]["content"][0]["video"]
    clip = DrawnClip(frames, 14)
    plain = PixelPictures([frames.pixels]).patches("cpu")
    drawn = clip.patches("cpu")
    assert clip.num_pictures == len(frames.times_seconds) == len(drawn.grid_thw)
    assert drawn.pixels.equal(plain.pixels) and drawn.grid_thw.equal(plain.grid_thw)
    # Drawn by another device: what it has drawn is read, and nothing drawn anew.
    elsewhere = frames.on("cuda")
    PICTURES.clear()
    PICTURES._pixels[elsewhere.key] = 255 - frames.pixels
    assert not DrawnClip(elsewhere, 14).patches("cpu").pixels.equal(plain.pixels)
    PICTURES.clear()
