"""What the server makes of an engine's events: reasoning, tool calls and errors, from a service that says what it is told."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkeye.apps.http_api.application import make_application
from openkeye.apps.http_api.limits import ServerLimits
from openkeye.apps.http_api.media_rules import MediaRules
from openkeye.apps.http_api.server import listen, run_server
from openkeye.engine.answer import Answer
from openkeye.engine.answering import ServiceStats
from openkeye.engine.events import ErrorEvent, FinishEvent, TokenEvent
from openkeye.inputs.answer_parser import AnswerParser

CALL = '<tool_call>\n{"name": "crop", "arguments": {"seconds": 5.5}}\n</tool_call>'
THOUGHT = "<think>\nIt is red.\n</think>\n\n"


class ScriptedService:
    """A service of the engine's shape whose answers are written down beforehand."""

    def __init__(self, pieces: list[str], finish_reason: str = "stop", error: ErrorEvent | None = None) -> None:
        self.pieces, self.finish_reason, self.error = pieces, finish_reason, error
        self.is_alive, self.has_given_up = True, False
        self.messages: list[dict] = []
        self.num_cancelled = 0

    def submit(self, messages, sampling, on_event, deadline_seconds=None, template_options=None, evidence=False):
        self.messages, self.template_options = messages, template_options
        for number, piece in enumerate(self.pieces):
            on_event(TokenEvent(number, piece, -1.0, []))
        text, num = "".join(self.pieces), len(self.pieces)
        answer = Answer(text, [], 7, 0, num, 0, 0.0, {}, self.finish_reason)
        on_event(self.error or FinishEvent(text, self.finish_reason, 7, 0, num, answer))
        return SimpleNamespace(cancel=self._cancel)

    def _cancel(self):
        self.num_cancelled += 1

    def stats(self):
        return ServiceStats(0, 0, 0, 0, 0, 0, 0, 0)

    def stop(self):
        self.is_alive = False


def ask(service: ScriptedService, path: str = "", **options: object) -> httpx.Response:
    """A question, or another path of the same application."""
    processor = SimpleNamespace(image_limits=SimpleNamespace(factor=28), decode=lambda ids, skip_special_tokens: str(ids))
    application = make_application(service, processor, "m", MediaRules(), ServerLimits())
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | options

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path) if path else await client.post("/v1/chat/completions", json=body)

    return asyncio.run(post())


def deltas(response: httpx.Response) -> list[dict]:
    lines = response.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]


def test_reasoning_and_tool_calls_in_a_whole_answer():
    service = ScriptedService(list(f"{THOUGHT}I look closer.\n{CALL}\n{CALL}"))
    choice = ask(service).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and service.num_cancelled == 1
    message = choice["message"]
    assert message["reasoning_content"] == "It is red." and message["content"] == "I look closer."
    first, second = message["tool_calls"]
    assert first["type"] == "function" and first["function"]["name"] == "crop" and first["id"] != second["id"]
    assert json.loads(first["function"]["arguments"]) == {"seconds": 5.5} and "index" not in first
    only_call = ask(ScriptedService([CALL])).json()["choices"][0]["message"]
    assert only_call["content"] is None and len(only_call["tool_calls"]) == 1


def test_reasoning_and_tool_calls_streamed():
    parts = deltas(ask(ScriptedService(list(f"{THOUGHT}I look closer.\n{CALL}\n{CALL}")), stream=True))
    assert "".join(part["delta"].get("reasoning_content", "") for part in parts) == "It is red."
    assert "".join(part["delta"].get("content", "") for part in parts) == "I look closer."
    calls = [part["delta"]["tool_calls"][0] for part in parts if "tool_calls" in part["delta"]]
    assert [call["index"] for call in calls] == [0, 1] and parts[-1]["finish_reason"] == "tool_calls"


def test_a_client_that_wants_no_tools_reads_calls_as_text():
    choice = ask(ScriptedService([CALL]), tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


def test_turns_with_tools_reach_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "crop", "arguments": '{"seconds": 5.5}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "Hm."}
    turns = [
        {"role": "developer", "content": "Be short."},
        said,
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "red"}]},
    ]
    service = ScriptedService(["ok"])
    assert ask(service, messages=turns).status_code == 200
    system, assistant, tool = service.messages
    assert system == {"role": "system", "content": "Be short."} and tool["tool_call_id"] == "1"
    assert assistant["tool_calls"][0]["function"] == {"name": "crop", "arguments": {"seconds": 5.5}}
    assert assistant["content"] == "" and assistant["reasoning_content"] == "Hm."
    call["function"]["arguments"] = "{"
    response = ask(service, messages=turns)
    assert response.status_code == 400 and "arguments of crop are not JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ErrorEvent("input", "too long"), 400),
        (ErrorEvent("full", "the queue is full"), 429),
        (ErrorEvent("internal", "ZeroDivisionError: secret"), 500),
        (ErrorEvent("stopped", "the engine is shutting down"), 503),
    ],
)
def test_errors_of_the_engine_have_their_status(error, status):
    service = ScriptedService([], error=error)
    for is_streamed in (False, True):
        response = ask(service, stream=is_streamed)
        assert response.status_code == status and service.num_cancelled
        told = response.json()["error"]["message"]
        assert told == error.message if status != 500 else "secret" not in told
        assert ("retry-after" in response.headers) is (status in (429, 503))


def test_an_error_behind_the_first_token_ends_a_stream_with_it():
    lines = ask(ScriptedService(["a"], error=ErrorEvent("internal", "x")), stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error" and "[DONE]" not in lines[-1]
    assert ask(ScriptedService(["a"], error=ErrorEvent("internal", "x"))).status_code == 500


def test_an_engine_that_died_is_told():
    service = ScriptedService(["a"])
    assert ask(service, path="/health").json() == {"status": "ok"}
    service.is_alive = False
    health = ask(service, path="/health")
    assert health.status_code == 503 and "is being started again" in health.json()["error"]["message"]
    assert int(health.headers["retry-after"]) > 0
    assert "openkeye_alive 0.0" in ask(service, path="/metrics").text
    response = ask(service)
    assert response.status_code == 503 and response.json()["error"]["type"] == "service_unavailable_error"


@pytest.mark.timeout(20)
def test_a_server_whose_engine_cannot_be_started_any_more_ends():
    service = ScriptedService([])
    service.has_given_up = True
    application = make_application(service, SimpleNamespace(image_limits=None), "m", MediaRules(), ServerLimits())
    run_server(application, listen("127.0.0.1", 0), 5, service, False)


def test_a_deadline_cuts_an_answer_or_refuses_it():
    cut = ask(ScriptedService(["a"], finish_reason="deadline")).json()
    assert cut["choices"][0]["finish_reason"] == "length" and cut["openkeye"]["finish_reason"] == "deadline"
    assert ask(ScriptedService([], finish_reason="deadline")).status_code == 503


def test_logprobs_of_the_impossible_are_json():
    service = ScriptedService(["a"])
    service.submit = lambda messages, sampling, on_event, deadline, options, evidence: (
        on_event(TokenEvent(1, "a", float("-inf"), [(2, -0.5)])),
        on_event(FinishEvent("a", "stop", 1, 0, 1, Answer("a", [], 1, 0, 1, 0, 0.0, {}, "stop"))),
        SimpleNamespace(cancel=lambda: None),
    )[-1]
    token = ask(service, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"][0]
    assert token["logprob"] == -9999.0 and token["top_logprobs"][0]["logprob"] == -0.5


def parsed(pieces: list[str]) -> list[tuple[str, str]]:
    """(kind, text) of an answer that comes in these pieces, neighbours of one kind joined."""
    parser = AnswerParser()
    joined: list[tuple[str, str]] = []
    for piece in [found for text in pieces for found in parser.feed(text)] + parser.finish():
        if joined and joined[-1][0] == piece.kind != "tool_call":
            joined[-1] = (piece.kind, joined[-1][1] + piece.text)
        else:
            joined.append((piece.kind, piece.text))
    return joined


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("5 < 6 <thin", [("content", "5 < 6 <thin")]),
        ("<think>open", [("reasoning", "open")]),
        ("<think></think>yes", [("content", "yes")]),
        ("<tool_call>{broken}</tool_call>", [("content", "<tool_call>{broken}</tool_call>")]),
        ('<tool_call>{"name": "f"', [("content", '<tool_call>{"name": "f"')]),
        (
            'a <tool_call>{"name": "f", "arguments": "{}"}</tool_call> b',
            [("content", "a"), ("tool_call", "{}"), ("content", "b")],
        ),
        ("  two\n\nlines \n", [("content", "  two\n\nlines \n")]),
    ],
)
def test_what_is_no_tag_stays(text, wanted):
    assert parsed([text]) == wanted and parsed(list(text)) == wanted


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", " ", "\n", "a", '{"name": "f"}']))


@given(TEXTS, st.integers(1, 7))
def test_cuts_between_pieces_change_nothing(parts, size):
    text = "".join(parts)
    assert parsed([text]) == parsed([text[start : start + size] for start in range(0, len(text), size)])
