"""The HTTP client against a real server on this machine that is busy, slow, broken, or refuses."""

import asyncio
import contextlib
import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import PIL.Image
import pytest

from openkeye.agents.http_client import HttpModelClient, HttpModelSettings
from openkeye.agents.recorded_model import RecordedModel, RecordingModel, conversation_key
from openkeye.common.checks import InputError

ASK = [{"role": "user", "content": "Hello"}]


def reply(message, reason="stop"):
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": reason}], "usage": {"total_tokens": 5}}), {}


@pytest.fixture
def server():
    """Answers with what `script` holds, in order; `seen` has every request's body and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            served.seen.append((json.loads(body), dict(self.headers), self.path))
            answer = served.script.pop(0)
            if answer == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(40):
                    if served.is_over.wait(0.1):
                        return
                    self.wfile.write(b" ")
                    self.wfile.flush()
                return
            if answer == "hang up":
                self.connection.close()
                return
            status, text, headers = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

        def handle(self):
            # (a client that gave up)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ValueError):
                super().handle()

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.script, served.seen, served.is_over = [], [], threading.Event()
    thread = threading.Thread(target=served.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.is_over.set()
    served.shutdown()
    thread.join()
    served.server_close()


def client(server, **settings):
    defaults = {"first_wait_seconds": 0.01, "timeout_seconds": 5.0, "num_tries": 3}
    return HttpModelClient(HttpModelSettings(f"http://127.0.0.1:{server.server_port}/v1", "judge", **{**defaults, **settings}))


def ask(model, messages=ASK, tools=()):
    async def once():
        try:
            return await model.reply(messages, tools)
        finally:
            await model.close()

    return asyncio.run(once())


def test_a_reply_is_taken_apart(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    calls = [
        {"id": "a", "function": {"name": "find", "arguments": '{"n": 1}'}},
        {"id": "b", "function": {"name": "find", "arguments": '{"n": '}},
        {"function": {"name": "find"}},
        "call",
    ]
    server.script = [reply({"content": " Well. ", "reasoning_content": "Hm.", "tool_calls": calls}, "tool_calls")]
    model = pickle.loads(pickle.dumps(client(server, key_variable="JUDGE_KEY", sampling={"temperature": 0.5})))
    picture = {"type": "image", "image": PIL.Image.new("RGB", (2, 2))}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "z", "function": {"name": "f", "arguments": {"x": 1}}}]},
    ]
    said = ask(model, messages, [{"type": "function", "function": {"name": "find"}}])
    assert (said.text, said.reasoning, said.finish_reason) == ("Well.", "Hm.", "tool_calls")
    assert [call["id"] for call in said.tool_calls] == ["a", "call_2"] and said.tool_calls[0]["arguments"] == {"n": 1}
    assert len(said.malformed) == 2 and said.details["usage"] == {"total_tokens": 5}
    body, headers, path = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0.5 and body["tools"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


def test_reasoning_in_the_text_is_taken_out(server):
    server.script = [reply({"content": "<think>Hm.</think>\n\nWell."}, "length")]
    said = ask(client(server))
    assert (said.text, said.reasoning, said.finish_reason) == ("Well.", "Hm.", "length")


def test_busy_servers_are_asked_again(server):
    server.script = [(503, "busy", {}), "hang up", (429, "slow down", {"Retry-After": "0.3"}), reply({"content": "Yes"})]
    start = time.monotonic()
    assert ask(client(server, num_tries=4)).text == "Yes"
    assert len(server.seen) == 4 and time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    ("script", "error", "message", "num_asked"),
    [
        ([(400, '{"error": {"message": "too long"}}', {})], InputError, "too long", 1),
        ([(401, "no", {})], OSError, "OPENAI_API_KEY", 1),
        ([(404, "no", {})], OSError, "check the address", 1),
        ([(500, "broken", {})] * 3, OSError, "no answer after 3 tries, at last HTTP 500: broken", 3),
        ([(200, "<html>", {})] * 3, OSError, "not JSON", 3),
        ([(200, "{}", {})], OSError, "is it a chat API", 1),
        ([(200, '{"choices": [{"message": {"content": [1]}}]}', {})], OSError, "is it a chat API", 1),
        (["drip"] * 3, OSError, "nothing whole in 0.3 s", 3),
    ],
)
def test_failures_are_told(server, monkeypatch, script, error, message, num_asked):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.script = list(script)
    with pytest.raises(error, match=message):
        ask(client(server, timeout_seconds=0.3 if "drip" in script else 5.0))
    assert len(server.seen) == num_asked and "Authorization" not in server.seen[0][1]


def test_nobody_there():
    settings = HttpModelSettings("http://127.0.0.1:9/v1", "m", num_tries=2, first_wait_seconds=0.01)
    with pytest.raises(OSError, match="no answer after 2 tries"):
        ask(HttpModelClient(settings))


@pytest.mark.parametrize(
    "wrong", [{"base_url": "host"}, {"model": ""}, {"num_tries": 0}, {"timeout_seconds": float("nan")}, {"max_at_once": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        HttpModelSettings(**{"base_url": "http://a/v1", "model": "m", **wrong})


def test_recorded_exchanges_say_what_was_said_and_nothing_else(server, tmp_path):
    server.script = [reply({"content": "one"}), reply({"content": "two"})]
    path = tmp_path / "exchanges.jsonl"
    for _ in range(2):
        model = client(server)
        ask_recording = RecordingModel(model, path)

        async def once(model=model, recording=ask_recording):
            said = await recording.reply(ASK)
            await model.close()
            return said

        asyncio.run(once())
    recorded = RecordedModel(path)
    assert recorded.name == client(server).name
    assert [asyncio.run(recorded.reply(ASK)).text for _ in range(2)] == ["one", "two"]
    with pytest.raises(InputError, match="holds 2 replies to 'Hello', asked for number 3"):
        asyncio.run(recorded.reply(ASK))
    with pytest.raises(InputError, match="holds 0 replies to 'Other'"):
        asyncio.run(recorded.reply([{"role": "user", "content": "Other"}]))
    with pytest.raises(InputError, match="cannot be read"):
        RecordedModel(tmp_path / "nowhere.jsonl")
    path.write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        RecordedModel(path)


def test_pictures_count_by_their_pixels():
    def key(colour):
        picture = {"type": "image", "image": PIL.Image.new("RGB", (2, 2), colour)}
        return conversation_key([{"role": "user", "content": [picture]}])

    assert key("red") == key("red") != key("blue")
