"""`openkeye serve` as its clients meet it: one real server with the bundled model, asked by four clients."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import openai
import PIL.Image
import pytest

from tests.apps.server_process import ANSWER, DEMO, MODEL, QUESTION, ROOT, ServerProcess, endless_model, question, serving

KEY = "sk-first"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media folder with a clip."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "media" / "below").mkdir(parents=True)
    shutil.copy(DEMO, folder / "media" / "demo.mp4")
    (folder / "media" / "words.txt").write_text("no video")
    os.symlink("../demo.mp4", folder / "media" / "below" / "inside.mp4")
    (folder / "keys.txt").write_text(f"# keys of tests\n\n{KEY}\nsk-second\n")
    return folder


@pytest.fixture(scope="module")
def server(media: Path) -> Iterator[ServerProcess]:
    options = ("--media-dir", media / "media", "--allow-remote-media", "--api-key-file", media / "keys.txt")
    with serving(*options, "--max-body-mib", "2", "--max-concurrent", "4") as running:
        yield running
        assert running.end() == 0
        assert not [line for line in running.errors if "Traceback" in line or "rror" in line], running.errors


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def official(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="sk-second", max_retries=0)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("endless"))


def ask(client: httpx.Client, body: dict[str, object]) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body)


def parts_of(address: str, text: str = QUESTION) -> list[dict[str, object]]:
    return [{"type": "video_url", "video_url": {"url": address}}, {"type": "text", "text": text}]


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture() -> str:
    content = io.BytesIO()
    PIL.Image.new("RGB", (112, 112), "red").save(content, "png")
    return data_url("image/png", content.getvalue())


def test_the_official_client_gets_a_true_answer(official):
    answer = official.chat.completions.create(**question(temperature=0, max_tokens=40, user="me"))
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12 and answer.usage.prompt_tokens > 600
    again = official.chat.completions.create(**question())
    assert again.usage.prompt_tokens_details.cached_tokens > 500
    ((first, last),) = again.openkeye["intervals_seconds"]
    assert abs(first - 5.30) < 0.3 and abs(last - 8.43) < 0.3
    assert [model.id for model in official.models.list()] == [MODEL] and official.models.retrieve(MODEL).id == MODEL


def test_the_official_client_streams_the_same(official):
    chunks = list(official.chat.completions.create(**question(stream=True, stream_options={"include_usage": True})))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == ANSWER and sum(bool(text) for text in texts) > 5
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks[:-1])
    with official.chat.completions.stream(**question()) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_come_for_every_token(official, is_streamed):
    options = question(logprobs=True, top_logprobs=2)
    if is_streamed:
        chunks = official.chat.completions.create(**options, stream=True)
        found = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    else:
        found = official.chat.completions.create(**options).choices[0].logprobs.content
    assert "".join(token.token for token in found) == ANSWER
    for token in found:
        assert bytes(token.bytes).decode() == token.token and token.logprob <= 0
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[1].logprob <= token.logprob


def test_pictures_and_videos_as_data_urls(official, client):
    content = [{"type": "image_url", "image_url": {"url": picture(), "detail": "low"}}, {"type": "text", "text": "What is it?"}]
    seen = official.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=8)
    assert seen.choices[0].message.content and seen.usage.prompt_tokens > 16
    content = parts_of(data_url("video/mp4", DEMO.read_bytes()))
    answer = ask(client, {"model": MODEL, "messages": [{"role": "user", "content": content}]}).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER


def test_files_below_the_media_folder_in_every_spelling(client, media):
    for address in ("demo.mp4", "./below/../demo.mp4", "below/inside.mp4", str(media / "media" / "demo.mp4")):
        for url in (address, f"file://{address}" if address.startswith("/") else address):
            response = ask(client, {"model": MODEL, "messages": [{"role": "user", "content": parts_of(url)}]})
            assert response.json()["choices"][0]["message"]["content"] == ANSWER, url


def test_options_of_a_video_choose_frames(client):
    def num_frames(**options: object) -> int:
        part = {"type": "video_url", "video_url": {"url": "demo.mp4", **options}}
        content = [part, {"type": "text", "text": QUESTION}]
        return ask(client, {"model": MODEL, "messages": [{"role": "user", "content": content}]}).json()["openkeye"][
            "num_frames"
        ]

    assert num_frames() == 29 and num_frames(fps=1) == 14
    assert num_frames(start=4, end=8) == 8 and num_frames(budget=160) == 10


def test_answers_end_where_they_are_asked_to(client):
    cut = ask(client, question(max_completion_tokens=3)).json()
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 3
    stopped = ask(client, question(stop=[" to", "!"])).json()["choices"][0]
    assert stopped["message"]["content"] == "From 5.7" and stopped["finish_reason"] == "stop"
    lines = ask(client, question(stop=" to", stream=True)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "From 5.7"


def test_a_seed_repeats_what_chance_chose(client):
    def told(seed: int) -> str:
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 16}
        return ask(client, question("Tell.", **options)).json()["choices"][0]["message"]["content"]

    assert told(1) == told(1)
    assert len({told(seed) for seed in range(4)}) > 1


def test_a_client_of_other_makers_gets_answers_streams_and_errors(server):
    client = huggingface_hub.InferenceClient(base_url=server.address, api_key=KEY)
    asked = question()["messages"]
    answer = client.chat_completion(asked, model=MODEL, max_tokens=40, temperature=0.0, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content) == 12
    chunks = list(client.chat_completion(asked, model=MODEL, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == 12
    content = [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "What is it?"}]
    seen = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=4)
    assert seen.choices[0].message.content
    with pytest.raises(huggingface_hub.errors.BadRequestError, match="n=1"):
        client.chat_completion(asked, model=MODEL, n=2)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
        huggingface_hub.InferenceClient(base_url=server.address, api_key="x").chat_completion(asked, model=MODEL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_an_answer(server):
    address = f"{server.address}/v1/chat/completions"
    command = ["curl", "-sN", address, "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    result = subprocess.run([*command, "-d", json.dumps(question())], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["choices"][0]["message"]["content"] == ANSWER
    result = subprocess.run([*command, "-d", json.dumps(question(stream=True))], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("data: {") and result.stdout.endswith("data: [DONE]\n\n")


def message(content: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def test_evidence_comes_where_it_is_asked_for(client):
    plain, asked = (ask(client, question(**options)).json() for options in ({}, {"evidence": True}))
    assert "evidence" not in plain and asked["choices"][0]["message"] == plain["choices"][0]["message"]
    (video,) = asked["evidence"]
    assert video["video"] == 0 and video["is_selective"] and 0.2 < video["share"] < 0.4 and 0.4 < video["weight"] < 0.8
    times = [moment["seconds"] for moment in video["moments"]]
    assert len(times) == asked["openkeye"]["num_frames"] == 29 and times == sorted(times)
    # 13 queries, whose last wrote the end, in 6 layers.
    for moment in video["moments"]:
        assert moment["share"] == pytest.approx(moment["count"] / (13 * 6 * moment["num_tokens"]), abs=1e-6)
    (first, last) = asked["openkeye"]["intervals_seconds"][0]
    heaviest = max(video["moments"], key=lambda moment: moment["weight"])
    assert first <= heaviest["seconds"] <= last
    assert ask(client, message("Hello") | {"evidence": True, "max_tokens": 4}).json()["evidence"] == []


def test_the_official_client_takes_evidence(official):
    whole = official.chat.completions.create(**question(), extra_body={"evidence": True})
    assert whole.choices[0].message.content == ANSWER and len(whole.evidence[0]["moments"]) == 29
    chunks = list(official.chat.completions.create(**question(), stream=True, extra_body={"evidence": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    told = [chunk.evidence for chunk in chunks if getattr(chunk, "evidence", None)]
    assert told == [whole.evidence] and chunks[-1].choices[0].finish_reason == "stop"


def test_the_official_client_knows_our_errors(official):
    with pytest.raises(openai.BadRequestError, match="n=1"):
        official.chat.completions.create(**question(n=2))
    with pytest.raises(openai.NotFoundError, match="openkeye-tiny"):
        official.chat.completions.create(**question() | {"model": "gpt-5"})
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        official.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="not a readable video"):
        official.chat.completions.create(**message(parts_of("words.txt")), stream=True)


@pytest.mark.parametrize("header", [None, "", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer sk-firs", "Bearer é"])
def test_wrong_keys_are_refused(server, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing")):
        response = httpx.request(method, f"{server.address}{path}", headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}


def test_what_is_no_route_or_no_json_or_too_large_is_refused(client):
    assert client.get("/v1/nothing").status_code == 404 and "error" in client.get("/v1/nothing").json()
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/web/../keys.py").status_code == client.get("/web/%2e%2e/keys.py").status_code == 404
    form = client.post("/v1/chat/completions", data={"model": MODEL})
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]
    large = ask(client, message("x" * (3 << 20)))
    assert large.status_code == 413 and "2,097,152 bytes" in large.json()["error"]["message"]


def test_the_page_and_its_files_come_without_a_key(server):
    page = httpx.get(server.address)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in re.findall(r'"(/web/[^"]+)"', page.text):
        response = httpx.get(f"{server.address}{name}")
        assert response.status_code == 200 and response.headers["content-type"].startswith(("text/css", "text/javascript"))


def figure(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and line[len(name)] in " {")


def test_metrics_count(client):
    names = ("openkeye_prompt_tokens_total", "openkeye_output_tokens_total", "openkeye_time_to_first_token_seconds_count")
    before = {name: figure(client, name) for name in names}
    ask(client, question())
    after = {name: figure(client, name) for name in names}
    assert after[names[0]] > before[names[0]] + 600
    assert after[names[1]] == before[names[1]] + 12 and after[names[2]] == before[names[2]] + 1
    assert figure(client, 'openkeye_http_requests_total{route="/v1/chat/completions",status="200"}'[:28]) > 1
    assert 'route="/v1/chat/completions",status="400"' in client.get("/metrics").text
    assert figure(client, "openkeye_pages_free") == figure(client, "openkeye_pages") > 0
    assert figure(client, "openkeye_requests_running") == figure(client, "openkeye_requests_waiting") == 0


def long_question(num_tokens: int = 4000, **options: object) -> dict[str, object]:
    """What takes the endless model this many tokens."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Tell."}], "max_tokens": num_tokens, **options}


def test_a_client_that_leaves_ends_its_request_and_too_many_wait_outside(endless):
    options = ("--model", endless, "--max-concurrent", "3", "--grace-seconds", "1", "--max-answer-tokens", "30000")
    with serving(*options) as running, httpx.Client(base_url=running.address, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=long_question(stream=True)) as stream:
            first, end = next(stream.iter_lines()), time.monotonic() + 20
            # The worker is asked, and a busy machine may have no answer of its in time.
            while figure(client, "openkeye_requests_running") != 1:
                assert time.monotonic() < end, (first, running.errors)
                time.sleep(0.05)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=long_question(), timeout=0.5)
        end = time.monotonic() + 5
        while figure(client, "openkeye_requests_running") + figure(client, "openkeye_requests_waiting"):
            assert time.monotonic() < end, "a request runs on without its client"
            time.sleep(0.05)
        assert figure(client, "openkeye_pages_free") == figure(client, "openkeye_pages")

        statuses: list[int] = []
        run = lambda: statuses.append(client.post("/v1/chat/completions", json=long_question(60)).status_code)  # noqa: E731
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429} and 3 <= statuses.count(200) < 8

        # A server that is stopped does not wait for ever, and says so to whom it leaves.
        with client.stream("POST", "/v1/chat/completions", json=long_question(30_000, stream=True)) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the engine is shutting down"
        assert running.process.wait(timeout=20) == 0 and len(running.errors) == 1, running.errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--api-key-file", "nothing.txt"), "nothing.txt: the file of API keys cannot be read (No such file"),
        (("--api-key-file", "/dev/null"), "/dev/null: no API key in it"),
        (("--media-dir", "nothing"), "nothing: no such folder"),
        (("--model", "nothing"), "nothing: no such model folder"),
        (("--port", "70000"), "--port is 70000"),
        (("--host", "8.8.8.8"), "cannot listen on 8.8.8.8"),
        (("--max-concurrent", "0"), "--max-concurrent is 0"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(options, said):
    command = [sys.executable, "-m", "openkeye.apps.commands", "serve", "--port", "0", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_port_in_use_is_told_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "openkeye.apps.commands", "serve", "--port", str(taken.getsockname()[1])]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and "(Address already in use)" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_lets_an_answer_finish(number, endless):
    with serving("--model", endless, "--grace-seconds", "20") as running:
        body = long_question(100, stream=True)
        with httpx.stream("POST", f"{running.address}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(number)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert running.process.wait(timeout=20) == 0 and len(running.errors) == 1
