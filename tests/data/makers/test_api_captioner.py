"""The API captioner over real sockets: what it sends, what it retries, and how it gives up."""

import base64
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.api_captioner import ApiCaptioner, ApiSettings
from openkeye.data.makers.captioner import CaptionerError
from openkeye.data.makers.made_sample import image_part, text_part, user, video_part
from tests.data.makers.media import film_clip, write_background

Reply = tuple[int, dict[str, str], bytes]
QUESTION = [user(text_part("What?"))]


def said(text: str | None, reason: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class ScriptedServer(http.server.ThreadingHTTPServer):
    """Gives its replies one after the other, the last for ever, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Reply] = []
        self.received: list[tuple[str, dict[str, str], dict]] = []
        self.times: list[float] = []

    def captioner(self, *replies: Reply, **options: object) -> ApiCaptioner:
        self.replies, self.received, self.times = list(replies), [], []
        address = f"http://127.0.0.1:{self.server_address[1]}/v1/"
        return ApiCaptioner(ApiSettings(address, "m", **{"first_wait_seconds": 0.01, "api_key": "sk-x"} | options))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.path, dict(self.headers), body))
        self.server.times.append(time.monotonic())
        status, headers, content = self.server.replies[min(len(self.server.received), len(self.server.replies)) - 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def test_the_request_is_a_chat_with_pictures(server: ScriptedServer, tmp_path: Path):
    film_clip(tmp_path / "a.mp4", seconds=8.0)
    write_background(tmp_path / "b.png", 200, (400, 100))
    captioner = server.captioner(said("A room."), max_side=200, max_tokens=77)
    parts = [video_part(tmp_path / "a.mp4", 2.0, 5.999), image_part(tmp_path / "b.png"), text_part("What?")]
    assert captioner.caption([user(*parts)]) == "A room."
    ((path, headers, body),) = server.received
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-x"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 77, 0.0)
    *frames, picture, question = body["messages"][0]["content"]
    assert question == {"type": "text", "text": "What?"}
    assert [part["text"] for part in frames[::2]] == [f"At {seconds} seconds:" for seconds in ("2.0", "3.3", "4.6", "5.9")]
    sizes = []
    for part in [*frames[1::2], picture]:
        header, _, content = part["image_url"]["url"].partition(",")
        assert header == "data:image/jpeg;base64"
        sizes.append(PIL.Image.open(io.BytesIO(base64.b64decode(content))).size)
    assert sizes == [(168, 168)] * 4 + [(200, 50)]


def test_long_videos_send_no_more_frames_than_allowed(server: ScriptedServer, tmp_path: Path):
    film_clip(tmp_path / "a.mp4", seconds=12.0)
    captioner = server.captioner(said("x"), max_frames=5)
    captioner.caption([user(video_part(tmp_path / "a.mp4"))])
    kinds = [part["type"] for part in server.received[0][2]["messages"][0]["content"]]
    assert kinds.count("image_url") == 5


@pytest.mark.parametrize("trouble", [failed(429), failed(500), failed(503), (200, {}, b"<html>"), (502, {}, b"bad gateway")])
def test_busy_servers_are_asked_again(server: ScriptedServer, trouble: Reply):
    assert server.captioner(trouble, trouble, said("At last.")).caption(QUESTION) == "At last."
    assert len(server.received) == 3


def test_waits_double_and_heed_the_server(server: ScriptedServer):
    server.captioner(failed(429), failed(429), failed(429, Retry_After="0.5"), said("x"), first_wait_seconds=0.1).caption(
        QUESTION
    )
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert 0.1 <= waits[0] < 0.25 and 0.2 <= waits[1] < 0.4 and 0.5 <= waits[2] < 0.8


def test_it_gives_up_in_one_line(server: ScriptedServer):
    captioner = server.captioner(failed(503, "the engine\nis away"), num_tries=3)
    with pytest.raises(
        CaptionerError, match=r"no answer after 3 tries, at last HTTP 503: the engine is away; start it"
    ) as caught:
        captioner.caption(QUESTION)
    assert "\n" not in str(caught.value) and len(server.received) == 3


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CaptionerError, match=r"after 4 tries, at last .*refused"):
        ApiCaptioner(ApiSettings(address, "m", num_tries=4, first_wait_seconds=0.01)).caption(QUESTION)


def test_who_is_stopped_waits_no_longer(server: ScriptedServer):
    captioner = server.captioner(failed(503), first_wait_seconds=60.0)
    timer = threading.Timer(0.3, captioner.stop)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(CaptionerError, match="after 1 tries"):
        captioner.caption(QUESTION)
    assert 0.2 < time.monotonic() - begin < 5.0
    with pytest.raises(CaptionerError, match="stopped"):
        captioner.caption(QUESTION)
    assert len(server.received) == 1


def test_a_server_that_hangs_is_left(server: ScriptedServer):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        settings = ApiSettings(address, "m", timeout_seconds=0.2, num_tries=2, first_wait_seconds=0.01)
        with pytest.raises(CaptionerError, match=r"after 2 tries, at last .*timed out"):
            ApiCaptioner(settings).caption(QUESTION)


@pytest.mark.parametrize(
    ("status", "mend"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "ends with /v1"), (418, "check")]
)
def test_what_asking_again_cannot_mend_ends_at_once(server: ScriptedServer, status: int, mend: str):
    with pytest.raises(CaptionerError, match=mend):
        server.captioner(failed(status)).caption(QUESTION)
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (failed(400, "too many pictures"), r"HTTP 400: too many pictures"),
        (failed(413, "too large"), r"HTTP 413"),
        (said("It is a", "length"), r"--captioner-max-tokens"),
        (said("", "content_filter"), r"content_filter"),
        (said(None), r"gave no text"),
    ],
)
def test_what_is_about_one_medium_blames_that_one(server: ScriptedServer, reply: Reply, reason: str):
    with pytest.raises(InputError, match=reason):
        server.captioner(reply).caption(QUESTION)
    assert len(server.received) == 1


def test_what_is_no_chat_api(server: ScriptedServer):
    with pytest.raises(CaptionerError, match="is it a chat API"):
        server.captioner((200, {}, b'{"hello": 1}')).caption(QUESTION)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"base_url": "ftp://x/v1"}, "not an address of an API"),
        ({"model": ""}, "--captioner-model"),
        ({"fps": 0.0}, "a rate above 0"),
        ({"max_frames": 0}, "max_frames"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, reason: str):
    with pytest.raises(InputError, match=reason):
        ApiSettings(**{"base_url": "http://x/v1", "model": "m"} | options)
