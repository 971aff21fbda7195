"""What rollouts sample: log-probabilities that scoring confirms, versions, routes, interruptions, one prompt for a group."""

import asyncio
import pickle

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine.batch_thread import StoppedError
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from openkeye.engine.scores import score_output
from openkeye.engine.update_file import write_update
from openkeye.engine.weight_update import WeightUpdate, changes_between
from openkeye.inputs.patches import join_patches, patches_from_pixels
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from openkeye.rl.policy_engine import PolicyConfig, PolicyEngine, TurnInterrupted, lay_out_prompt
from openkeye.rl.rollout import RolloutId
from tests.engine.other_weights import changed, published
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

SAMPLING = SamplingParameters(temperature=1.0, max_new_tokens=24)
EXACT = EngineConfig(is_batch_invariant=True, prefill_chunk_tokens=128, max_batch_requests=6, page_size=16)
TEXT = [{"role": "user", "content": "Count the stars and the circles, and tell when each is seen."}]


def id_of(member: int, number: int = 0) -> RolloutId:
    return RolloutId("task", number, 0, member)


def with_policy(engine: Engine, work, config: PolicyConfig | None = None):
    """What an async function of a policy returns; the policy is closed, and no page is lost."""
    policy = PolicyEngine(engine, config)
    try:
        return asyncio.run(work(policy))
    finally:
        policy.close()
        assert all_pages_are_accounted_for(engine)


def endless(config: EngineConfig | None = None) -> Engine:
    """An engine whose answers are cut at their longest."""
    engine = Engine(config=config)
    engine.stop_ids = frozenset()
    return engine


async def until_sampled(engine: Engine, count: int) -> None:
    """Wait until the oldest running answer has so many tokens."""
    while not engine.scheduler.running or len(engine.scheduler.running[0].output_ids) < count:
        await asyncio.sleep(0.002)


@pytest.fixture(scope="module")
def weights():
    old = published()
    return old, changed(old)


def test_logprobs_are_those_that_scoring_gives_the_end_token_included(video):
    engine = Engine(config=EngineConfig(records_routes=True))
    prompts = [lay_out_prompt(messages, engine.processor) for messages in (TEXT, chat(video, QUESTIONS[0]))]

    async def work(policy):
        return await asyncio.gather(*(policy.sample(prompt, SAMPLING, id_of(n)) for n, prompt in enumerate(prompts)))

    for prompt, turn in zip(prompts, with_policy(engine, work), strict=True):
        assert turn.ids.dtype == turn.versions.dtype == np.int32 and (turn.versions == 0).all()
        assert (turn.finish_reason == "stop") is (turn.ids[-1] in engine.stop_ids)
        assert not set(turn.ids[:-1].tolist()) & engine.stop_ids
        request = Request(prompt, SamplingParameters(max_new_tokens=len(turn.ids)), frozenset())
        scored = score_output(engine.runner, engine.scheduler, request, turn.ids.tolist())
        engine.scheduler.clear()
        assert turn.logprobs.tolist() == pytest.approx(scored, abs=2e-5)
    assert turn.finish_reason == "stop"


def test_same_id_same_tokens_whatever_runs_beside_it_and_other_ids_other_tokens(video):
    prompt_of = {"text": TEXT, "video": chat(video, QUESTIONS[0])}

    def sampled(names: list[tuple[str, int]]) -> dict:
        engine = endless(EXACT)
        prompts = {name: lay_out_prompt(messages, engine.processor) for name, messages in prompt_of.items()}

        async def work(policy):
            turns = await asyncio.gather(*(policy.sample(prompts[name], SAMPLING, id_of(n)) for name, n in names))
            return {key: (turn.ids.tolist(), turn.logprobs.tolist()) for key, turn in zip(names, turns, strict=True)}

        return with_policy(engine, work)

    alone, together = sampled([("text", 0)]), sampled([("video", 3), ("text", 1), ("text", 0), ("text", 2), ("video", 4)])
    assert together["text", 0] == alone["text", 0]
    assert len({tuple(ids) for ids, _ in together.values()}) == 5


def test_a_group_reads_its_prompt_once(video):
    engine = endless()
    prompt = lay_out_prompt(chat(video, QUESTIONS[0]), engine.processor)
    computed = []
    run = engine.runner.run
    engine.runner.run = lambda batch: computed.extend((s.start, s.count) for s in batch.segments) or run(batch)

    async def work(policy):
        # Nothing runs before all have come.
        await policy.hold()
        members = [asyncio.ensure_future(policy.sample(prompt, SAMPLING, id_of(n))) for n in range(4)]
        await asyncio.sleep(0.2)
        await policy.go_on()
        return await asyncio.gather(*members)

    turns = with_policy(engine, work)
    page = engine.config.page_size
    num_read = sum(count for start, count in computed if start < prompt.num_tokens)
    assert num_read < prompt.num_tokens + 3 * (page + 1)
    assert sorted(turn.num_cached_tokens for turn in turns) == [0] + [(prompt.num_tokens - 1) // page * page] * 3


def test_an_interrupted_turn_goes_on_in_another_engine_as_if_nothing_had_been():
    prompt = lay_out_prompt(TEXT, Engine().processor)
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=60)

    async def whole(policy):
        return await policy.sample(prompt, sampling, id_of(0))

    async def begin(policy):
        engine = policy._engine
        turn = asyncio.ensure_future(policy.sample(prompt, sampling, id_of(0)))
        other = asyncio.ensure_future(policy.sample(prompt, SAMPLING, id_of(1)))
        await until_sampled(engine, 20)
        partials = await policy.interrupt([id_of(0)])
        with pytest.raises(TurnInterrupted) as interrupted:
            await turn
        assert (interrupted.value.partial.ids == partials[id_of(0)].ids).all()
        assert len((await other).ids) == 24 and await policy.interrupt() == {}
        return pickle.dumps(partials)

    config = EngineConfig(**(vars(EXACT) | {"records_routes": True}))
    expected = with_policy(endless(config), whole)
    partial = pickle.loads(with_policy(endless(config), begin))[id_of(0)]
    assert 0 < len(partial.ids) < 60 and (partial.ids == expected.ids[: len(partial.ids)]).all()

    async def go_on(policy):
        return await policy.sample(prompt, sampling, id_of(0), partial=partial)

    turn = with_policy(endless(config), go_on)
    for name in ("ids", "logprobs", "versions", "routes"):
        assert (getattr(turn, name) == getattr(expected, name)).all(), name


def test_routes_are_those_of_the_router_and_prefix_hits_do_not_lose_them(video):
    engine = endless(EngineConfig(records_routes=True))
    prompt = lay_out_prompt(chat(video, QUESTIONS[0]), engine.processor)

    async def work(policy):
        first = await policy.sample(prompt, SAMPLING, id_of(0))
        return first, await policy.sample(prompt, SAMPLING, id_of(1))

    first, second = with_policy(engine, work)
    length, config = prompt.num_tokens + 24, engine.runner.model.config
    assert second.num_cached_tokens > 64
    for turn in (first, second):
        assert turn.routes.dtype == np.int16
        assert turn.routes.shape == (length, config.num_hidden_layers, config.num_experts_per_tok)
        assert (turn.routes[-1] == -1).all() and (
            np.sort(turn.routes[:-1])[..., 1:] > np.sort(turn.routes[:-1])[..., :-1]
        ).all()
        assert turn.routes[:-1].min() >= 0 and turn.routes.max() < config.num_experts
    assert (first.routes[: prompt.num_tokens - 1] == second.routes[: prompt.num_tokens - 1]).mean() > 0.999
    # One shot of the same tokens through the plain model's routers.
    assert (plain_routes(engine, prompt, second.ids)[: length - 1] == second.routes[:-1]).mean() > 0.999
    assert with_policy(endless(), lambda policy: policy.sample(prompt, SAMPLING, id_of(0))).routes is None


def plain_routes(engine: Engine, prompt, ids: np.ndarray) -> np.ndarray:
    model = load_model(engine.model_dir, "cpu", torch.float32)
    mixtures = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
    for mixture in mixtures:
        mixture.keeps_picks = True
    patches = join_patches([patches_from_pixels(frames.pixels, 14) for frames in prompt.media])
    positions = (torch.arange(len(ids)) + prompt.num_tokens + prompt.model_input.rope_delta).expand(3, -1)
    with torch.inference_mode():
        given = model.embed(prompt.model_input.input_ids, None, model.encode_patches(patches))
        embeds = torch.cat([given, model.embed(torch.from_numpy(ids).long(), None, None)])
        past = PlainPast(model.config.indexer.top_k)
        model(embeds, torch.cat([prompt.model_input.position_ids, positions], dim=1), past)
    return torch.stack([mixture.picked_TK for mixture in mixtures], dim=1).numpy()


@pytest.mark.parametrize("keys", ["recompute", "keep"])
def test_weights_change_in_the_middle_of_a_turn(weights, keys, tmp_path):
    old, new = weights
    engine = endless(EngineConfig(records_routes=True))
    prompt = lay_out_prompt(TEXT, engine.processor)
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=60)
    path = write_update(tmp_path, WeightUpdate(7, changes_between(old, new), 0))

    async def work(policy):
        turn = asyncio.ensure_future(policy.sample(prompt, sampling, id_of(0)))
        await until_sampled(engine, 5)
        assert await policy.publish_file(path) == {} and policy.version == 7
        later = await policy.sample(prompt, SAMPLING, id_of(1))
        with pytest.raises(InputError, match="for an engine of version 7"):
            await policy.publish(7, new)
        return await turn, later, await policy.sample(prompt, SAMPLING, id_of(1))

    turn, later, again = with_policy(engine, work, PolicyConfig(keys_after_update=keys))
    assert set(turn.versions.tolist()) == {0, 7} and (np.diff(turn.versions) >= 0).all()
    assert turn.has_mixed_keys is (keys == "keep") and not later.has_mixed_keys
    assert (later.versions == 7).all() and (turn.routes[:-1] >= 0).all()
    num_old = int((turn.versions == 0).sum())
    recording = endless(EngineConfig(records_routes=True))
    before = with_policy(recording, lambda policy: policy.sample(prompt, sampling, id_of(0)))
    # Routes by which a token was sampled stay, also where its keys are made again.
    known = prompt.num_tokens + num_old - 1
    assert (before.routes[:known] == turn.routes[:known]).all()
    assert (before.ids[:num_old] == turn.ids[:num_old]).all() and not (before.ids == turn.ids).all()
    # What comes later is the new weights' alone, as if there had been no others.

    async def fresh(policy):
        await policy.publish(7, new)
        return await policy.sample(prompt, SAMPLING, id_of(1))

    expected = with_policy(endless(), fresh)
    assert (expected.ids == later.ids).all() and (expected.ids == again.ids).all()
    assert later.logprobs == pytest.approx(expected.logprobs, abs=2e-5)


def test_a_publication_may_hand_unfinished_turns_out(weights):
    engine = endless()
    prompt = lay_out_prompt(TEXT, engine.processor)
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=60)

    async def work(policy):
        turn = asyncio.ensure_future(policy.sample(prompt, sampling, id_of(0)))
        await until_sampled(engine, 5)
        partials = await policy.publish(1, weights[1].items(), interrupts=True)
        with pytest.raises(TurnInterrupted):
            await turn
        return partials[id_of(0)], await policy.sample(prompt, sampling, id_of(0), partial=partials[id_of(0)])

    partial, turn = with_policy(engine, work)
    assert len(turn.ids) == 60 and (turn.ids[: len(partial.ids)] == partial.ids).all()
    assert turn.versions.tolist() == [0] * len(partial.ids) + [1] * (60 - len(partial.ids))


def test_an_engine_catches_up_with_a_folder_of_updates(weights, tmp_path):
    old, new = weights
    newest = changed(new, seed=3)
    write_update(tmp_path, WeightUpdate(5, changes_between(old, new), 4))
    write_update(tmp_path, WeightUpdate(6, changes_between(new, newest), 5))
    engine, expected = Engine(), load_model(Engine().model_dir, "cpu", torch.float32)
    expected.load_state_dict(newest)
    policy = PolicyEngine(engine, version=4)
    try:
        assert [asyncio.run(policy.publish_folder(tmp_path)) for _ in range(2)] == [6, 6]
    finally:
        policy.close()
    parameters = dict(engine.runner.model.named_parameters())
    assert all(parameters[name].equal(tensor) for name, tensor in expected.named_parameters())


def test_a_given_turn_is_found_in_the_pages_that_it_left():
    engine = endless(EngineConfig(page_size=16))
    prompt = lay_out_prompt(TEXT, engine.processor)

    async def work(policy):
        first = await policy.sample(prompt, SAMPLING, id_of(0))
        second = await policy.sample(prompt, SAMPLING, id_of(0), given_ids=[*first.ids, 207, 1])
        return first, second

    first, second = with_policy(engine, work)
    # The last token of a turn has no keys when it ends.
    assert second.num_cached_tokens == (prompt.num_tokens + len(first.ids) - 1) // 16 * 16

    alone = endless(EngineConfig(page_size=16))
    again = with_policy(alone, lambda p: p.sample(prompt, SAMPLING, id_of(0), given_ids=[*first.ids, 207, 1]))
    assert again.num_cached_tokens == 0 and (again.ids == second.ids).all()


def test_what_cannot_be_sampled_is_refused_and_a_closed_policy_says_so():
    engine = Engine(config=EngineConfig(cache_tokens=128))
    prompt = lay_out_prompt(TEXT, engine.processor)

    async def work(policy):
        for options, message in (
            ({"sampling": SamplingParameters(stop=("a",))}, "stop strings"),
            ({"given_ids": np.ones(40000, dtype=np.int32)}, "leave no room"),
            ({"sampling": SamplingParameters(max_new_tokens=500)}, "cache tokens, the engine has 128"),
        ):
            with pytest.raises(InputError, match=message):
                await policy.sample(prompt, options.pop("sampling", SAMPLING), id_of(0), **options)
        waiting = asyncio.ensure_future(policy.sample(prompt, SAMPLING, id_of(0)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await policy.interrupt() == {}
        policy.close()
        with pytest.raises(StoppedError):
            await policy.sample(prompt, SAMPLING, id_of(0))

    with_policy(engine, work)
    with pytest.raises(InputError, match="keys_after_update"):
        PolicyConfig(keys_after_update="drop")
