"""Evidence counts exactly the queries that choose tokens of an answer, and finds what the answer speaks of."""

import numpy as np
import pytest
import torch

from openkeye.engine import batch as batch_module
from openkeye.engine import decode as decode_module
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.evidence import SLAB_KEYS, EvidenceCounts, attention_weights
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from openkeye.engine.video_evidence import VideoEvidence
from openkeye.frameforge.writer import make_clip
from openkeye.kernels import reference
from openkeye.kernels.dispatch import attend_in_pages
from openkeye.kernels.reference import quantize_vectors
from tests.engine.conftest import frames_of_clip
from tests.engine.test_loop import QUESTIONS, chat

FIVE = SamplingParameters(max_new_tokens=5)
NUM_LAYERS = 6


def add(engine: Engine, messages: list[dict], sampling: SamplingParameters = FIVE, evidence: bool = True) -> Request:
    """A request in the engine's queue that no token ends before its length."""
    request = engine.prepare(messages, sampling, evidence=evidence)
    request.stop_ids = frozenset()
    engine.scheduler.add(request)
    return request


def run(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


def alone(messages: list[dict], sampling: SamplingParameters = FIVE) -> Request:
    engine = Engine()
    request = add(engine, messages, sampling)
    run(engine)
    return request


def are_alike(found: Request, expected: Request) -> None:
    assert found.evidence is not None and expected.evidence is not None
    assert found.output_ids == expected.output_ids
    assert found.evidence.num_picks == expected.evidence.num_picks == NUM_LAYERS * len(found.output_ids)
    assert found.evidence.num_selective == expected.evidence.num_selective
    torch.testing.assert_close(found.evidence.weights_P(), expected.evidence.weights_P(), atol=1e-5, rtol=1e-3)
    # (where scores nearly tie, rounding may pick a neighbour)
    assert (found.evidence.counts_P() - expected.evidence.counts_P()).abs().sum() <= 2


def evidence_of(engine: Engine, request: Request) -> list[VideoEvidence]:
    found = engine.answer(request).evidence
    assert found is not None
    return found


@pytest.mark.parametrize("chunk", [50, 2048])
def test_counts_of_a_selection_made_by_hand(video, monkeypatch, chunk):
    def picks(positions_T):
        fixed = torch.tensor([3, 10, -1]).expand(len(positions_T), -1)
        return torch.cat([fixed, positions_T[:, None]], dim=1).int()

    def decode(query_BHD, _index_query, _gates, caches, table_BP, lengths_B, _k, scale, _scratch):
        picked = picks(lengths_B.long() - 1)
        return attend_in_pages(query_BHD, caches, picked, table_BP, scale), picked

    monkeypatch.setattr(batch_module, "indexer_select", lambda _query, _gates, _key, _k, positions_T, **_: picks(positions_T))
    monkeypatch.setattr(decode_module, "decode_in_pages", decode)
    engine = Engine(config=EngineConfig(prefill_chunk_tokens=chunk))
    request = add(engine, chat(video, QUESTIONS[0]))
    run(engine)
    assert request.evidence is not None and request.evidence.num_selective == request.evidence.num_picks == 30
    expected = torch.zeros(request.num_prompt, dtype=torch.int64)
    expected[[3, 10]] = NUM_LAYERS * 5
    # Every query takes its own position: the first is the prompt's last, the others are of the answer.
    expected[-1] = NUM_LAYERS
    assert torch.equal(request.evidence.counts_P(), expected)
    weights = request.evidence.weights_P()
    assert torch.equal(weights > 0, expected > 0) and 0.2 < float(weights.sum()) < 1


def test_weights_are_those_of_attention():
    generator = torch.Generator().manual_seed(3)
    query, keys = torch.randn(4, 16, generator=generator), torch.randn(SLAB_KEYS + 90, 2, 16, generator=generator)
    keys[5] = torch.nan
    slots = torch.randperm(SLAB_KEYS + 90, generator=generator)
    is_picked = slots != 5
    found = attention_weights(query, keys, slots, is_picked)
    for number in (0, 17, SLAB_KEYS + 1):
        one_hot = torch.zeros(SLAB_KEYS + 90, 2, 1)
        one_hot[number] = 1.0
        picked = torch.where(is_picked, torch.arange(len(slots)), -1)[None].int()
        clean = keys[slots].nan_to_num()
        attended = reference.sparse_attention(query[None], clean, one_hot.expand(-1, -1, 16), picked, 16**-0.5)
        torch.testing.assert_close(found[number], attended.mean(), atol=1e-7, rtol=1e-4)
    codes, scales = quantize_vectors(keys.nan_to_num())
    rounded = attention_weights(query, codes, slots, is_picked, scales)
    widened = attention_weights(query, codes.float() * scales[:, :, None], slots, is_picked)
    torch.testing.assert_close(rounded, widened)
    assert 0 < float((rounded - found).abs().sum()) < 0.1
    assert float(found.sum()) == pytest.approx(1, abs=1e-5) and float(found[~is_picked].sum()) == 0


@pytest.mark.parametrize("options", [{"attention": "dense"}, {"config": EngineConfig(dense_up_to=4096)}])
def test_where_all_is_attended_to_shares_are_one_and_weights_tell(video, options):
    engine = Engine(**options)
    request = add(engine, chat(video, QUESTIONS[0]))
    run(engine)
    (found,) = evidence_of(engine, request)
    assert not found.is_selective and found.share == 1 and {moment.share for moment in found.moments} == {1}
    assert len({moment.weight for moment in found.moments}) == len(found.moments) and 0 < found.weight < 1


def test_in_one_batch_a_dense_limit_counts_for_the_shorter_prompt_alone(video, other_video):
    both = [{"type": "video", "video": item} for item in (video, other_video)] + [{"type": "text", "text": "Why?"}]
    engine = Engine(config=EngineConfig(dense_up_to=800))
    short, long = add(engine, chat(video, QUESTIONS[0])), add(engine, [{"role": "user", "content": both}])
    run(engine)
    assert short.num_known < 800 < long.num_prompt
    assert short.evidence is not None and long.evidence is not None
    assert short.evidence.num_picks == long.evidence.num_picks == long.evidence.num_selective == NUM_LAYERS * 5
    assert not short.evidence.num_selective and evidence_of(engine, short)[0].share == 1


def test_a_short_prompt_is_not_selective():
    engine = Engine()
    request = add(engine, chat(frames_of_clip(0, num_frames=4), "Why?"))
    run(engine)
    assert request.num_known < engine.runner.model.config.indexer.top_k
    (found,) = evidence_of(engine, request)
    assert not found.is_selective and found.share == 1


def test_requests_of_a_batch_do_not_mix(video, other_video):
    engine = Engine(config=EngineConfig(prefill_chunk_tokens=200))
    prompts = (chat(video, QUESTIONS[0]), chat(other_video, QUESTIONS[1]), chat(video, QUESTIONS[2]))
    requests = [add(engine, messages, evidence=number != 2) for number, messages in enumerate(prompts)]
    run(engine)
    assert requests[2].evidence is None and engine.answer(requests[2]).evidence is None
    for request, messages in zip(requests[:2], prompts[:2], strict=True):
        are_alike(request, alone(messages))


def test_a_prefix_that_is_not_computed_again_is_counted_all_the_same(video):
    engine = Engine()
    for question in QUESTIONS[:2]:
        request = add(engine, chat(video, question))
        run(engine)
    assert request.num_cached > 0.8 * request.num_prompt
    are_alike(request, alone(chat(video, QUESTIONS[1])))


def test_preempted_requests_count_nothing_twice(video, other_video):
    prompts, sampling = (chat(video, QUESTIONS[0]), chat(other_video, QUESTIONS[0])), SamplingParameters(max_new_tokens=150)
    size = Engine().prepare(prompts[0], sampling).num_prompt
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=(2 * size + 120) // 16 * 16))
    requests = [add(engine, messages, sampling) for messages in prompts]
    run(engine)
    assert requests[1].num_preemptions >= 1
    for request, messages in zip(requests, prompts, strict=True):
        are_alike(request, alone(messages, sampling))


def test_requests_that_decode_together_count_apart(video):
    expected = [alone(chat(video, question)) for question in QUESTIONS[:2]]
    engine = Engine()
    requests = [add(engine, chat(video, question)) for question in QUESTIONS[:2]]
    run(engine)
    for found, one in zip(requests, expected, strict=True):
        are_alike(found, one)


def test_moments_are_the_frames_of_each_video(video, other_video):
    parts = [{"type": "video", "video": item} for item in (other_video, video)] + [{"type": "text", "text": "Why?"}]
    engine = Engine()
    request = add(engine, [{"role": "user", "content": parts}])
    run(engine)
    found = evidence_of(engine, request)
    assert [item.video for item in found] == [0, 1] and all(item.is_selective for item in found)
    assert request.evidence is not None
    counts = request.evidence.counts_P()
    for item, frames in zip(found, (other_video, video), strict=True):
        assert [moment.seconds for moment in item.moments] == frames.times_seconds
        assert item.moments[0].start_seconds == 0 and item.moments[-1].end_seconds <= frames.duration_seconds
        for before, after in zip(item.moments[:-1], item.moments[1:], strict=True):
            assert before.end_seconds == after.start_seconds == (before.seconds + after.seconds) / 2
        assert all(0 <= moment.share <= 1 and moment.weight > 0 for moment in item.moments)
        assert item.weight == pytest.approx(sum(moment.weight for moment in item.moments))
    first, last = request.pictures[0].first_token, request.pictures[-1].end_token
    first -= len(engine.processor.encode_frame_text(0.0))
    in_order = sum(moment.num_tokens for item in found for moment in item.moments)
    between = last - first - in_order
    # The template's own words between two videos are no moment's.
    assert 0 <= between < 8 and sum(m.count for item in found for m in item.moments) <= int(counts[first:last].sum())
    assert isinstance(found[0].to_dict()["moments"][0]["count"], int)


def test_an_answer_that_never_began_has_no_counts():
    counts = EvidenceCounts(4)
    assert counts.counts_P().tolist() == [0] * 4 and counts.weights_P().tolist() == [0.0] * 4


def test_weights_find_what_the_answer_speaks_of():
    """The heaviest frame is one that shows the thing asked for, far more often than a frame chosen blindly would be."""
    engine, hits, chances = Engine(), [], []
    for index in range(10):
        frames, clip = frames_of_clip(index), make_clip(5, index)
        for asked in [question for question in clip.questions if question.kind == "intervals"]:
            times = np.array(frames.times_seconds)
            is_shown = np.any([(times >= first - 0.25) & (times < last + 0.25) for first, last in asked.intervals], axis=0)
            if not is_shown.any():
                continue
            evidence = engine.generate(chat(frames, asked.text), evidence=True).evidence
            assert evidence is not None
            hits.append(is_shown[np.argmax([moment.weight for moment in evidence[0].moments])])
            chances.append(is_shown.mean())
    assert len(hits) >= 10 and np.mean(hits) > np.mean(chances) + 0.3, (hits, chances)
