"""With `is_batch_invariant` a request's tokens and log-probabilities are the same to the last bit, whatever runs beside it."""

import pytest

from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.events import TokenEvent
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from tests.engine.test_batching import TEXTS
from tests.engine.test_loop import QUESTIONS, chat

SAMPLING = SamplingParameters(max_new_tokens=24, logprobs=2)


def run(engine: Engine, chats: list[list[dict]], is_staggered: bool = False) -> tuple[list[list[TokenEvent]], int]:
    """Every token that each chat got, with its log-probabilities, and how often pages were taken away.

    Staggered: one is added every three batches. No answer ends before its last token.
    """
    engine.stop_ids = frozenset()
    events: list[list[TokenEvent]] = [[] for _ in chats]
    requests: list[Request] = []
    for told, messages in zip(events, chats, strict=True):
        requests.append(engine.prepare(messages, SAMPLING))
        requests[-1].on_token = told.append
        engine.scheduler.add(requests[-1])
        for _ in range(3 if is_staggered else 0):
            engine.step()
    while engine.scheduler.has_work:
        engine.step()
    return events, sum(request.num_preemptions for request in requests)


@pytest.fixture(scope="module")
def chats(video) -> list[list[dict]]:
    return [*([{"role": "user", "content": text}] for text in TEXTS), chat(video, QUESTIONS[0])]


def config(**options: int | str) -> EngineConfig:
    return EngineConfig(
        **{"is_batch_invariant": True, "prefill_chunk_tokens": 128, "max_batch_requests": 6, "page_size": 16} | options
    )


@pytest.mark.parametrize("options", [{}, {"kv_cache": "e4m3", "index_cache": "e4m3"}])
def test_company_changes_no_bit(chats, options):
    engine = Engine(config=config(**options))
    alone = [run(engine, [messages])[0][0] for messages in chats]
    assert run(Engine(config=config(**options)), chats)[0] == alone
    assert run(Engine(config=config(**options)), chats[::-1], is_staggered=True)[0][::-1] == alone


def test_neither_a_known_prefix_nor_lost_pages_change_a_bit(chats):
    engine, small = Engine(config=config()), Engine(config=config(cache_tokens=16 * 7))
    texts = [chats[0], chats[3], chats[0]]
    alone = [run(engine, [messages])[0][0] for messages in texts]
    # The second time full pages of some prompts are known.
    events, num_preemptions = zip(*(run(small, texts) for _ in range(2)), strict=True)
    assert list(events) == [alone, alone] and min(num_preemptions) > 0
