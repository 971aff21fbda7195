"""A captioner behind an OpenAI-compatible HTTP API; media travel as JPEG pictures, which every such API takes."""

import base64
import http.client
import io
import json
import math
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import CaptionerError
from openkeye.data.makers.made_sample import Message, text_part
from openkeye.inputs.image import open_image
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import iterate_frames, request_video
from openkeye.inputs.video_scan import scan_video

UNLIMITED_TOKENS = 1 << 40
# pictures for an API are counted, not measured in our tokens
ABOUT_THIS_REQUEST = (400, 413, 415, 422)
# statuses that blame what was sent; the next medium may do
TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class ApiSettings:
    """Where the model is, and how media are sent."""

    base_url: str
    # up to and with /v1
    model: str
    api_key: str | None = None
    max_tokens: int = 512
    # longest answer
    fps: float = 1.0
    max_frames: int = 32
    # of a video, or of the part of it that is asked about
    max_side: int = 768
    # pixels of a picture's longer side
    timeout_seconds: float = 120.0
    num_tries: int = 6
    first_wait_seconds: float = 1.0
    # doubled from try to try, up to a minute

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{self.base_url}: not an address of an API; give one such as https://HOST/v1")
        if not self.model:
            raise InputError(f"{self.base_url}: which of its models captions? give --captioner-model NAME")
        for name in ("max_tokens", "max_frames", "max_side", "num_tries"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the captioner is {getattr(self, name)}; give 1 or more")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"frames a second for the captioner are {self.fps}; give a rate above 0")


class ApiCaptioner:
    """`Captioner` over `POST BASE/chat/completions`."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self._stopped = threading.Event()

    @property
    def name(self) -> str:
        """The model's name at its address."""
        return f"{self.settings.model} at {self.settings.base_url}"

    def caption(self, messages: Sequence[Message]) -> str:
        """See `Captioner.caption`; busy or failing servers are asked again, with growing waits."""
        body = {
            "model": self.settings.model,
            "messages": [message | {"content": self._content(message["content"])} for message in messages],
            "max_tokens": self.settings.max_tokens,
            "temperature": 0.0,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            choice = reply["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError) as error:
            raise CaptionerError(f"{self.name}: the reply has no choices[0].message.content; is it a chat API?") from error
        if reason == "length":
            raise InputError(f"{self.name}: cut after {self.settings.max_tokens} tokens; raise --captioner-max-tokens")
        if reason == "content_filter" or not isinstance(text, str):
            raise InputError(f"{self.name}: gave no text (finish_reason {reason!r})")
        return text

    def stop(self) -> None:
        """See `Captioner.stop`; an answer under way is still received."""
        self._stopped.set()

    def _content(self, content: str | list[Message]) -> str | list[Message]:
        return content if isinstance(content, str) else [piece for part in content for piece in self._parts(part)]

    def _parts(self, part: Message) -> Iterator[Message]:
        """A part of a message as parts that the API takes: each frame is a picture behind its time."""
        if part["type"] == "text":
            yield part
        elif part["type"] == "image":
            yield self._picture(open_image(part["image"]))
        else:
            scan = scan_video(part["video"])
            limits = VideoLimits(
                self.settings.fps, total_tokens=UNLIMITED_TOKENS, min_frames=1, max_frames=self.settings.max_frames
            )
            request = request_video(scan, limits, 1, part.get("start_seconds"), part.get("end_seconds"))
            shrink = min(1.0, self.settings.max_side / max(scan.height, scan.width))
            height, width = max(1, round(scan.height * shrink)), max(1, round(scan.width * shrink))
            num_frames = 0
            for picture, seconds in iterate_frames(request, height, width):
                num_frames += 1
                yield text_part(f"At {seconds:.1f} seconds:")
                yield self._picture(PIL.Image.fromarray(picture))
            if not num_frames:
                raise InputError(f"{scan.source}: none of its sampled frames can be decoded; the file is damaged")

    def _picture(self, picture: PIL.Image.Image) -> Message:
        picture.thumbnail((self.settings.max_side, self.settings.max_side), PIL.Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def _post(self, body: bytes) -> Any:
        """The reply as JSON.

        Raises:
            InputError: the API refuses this request.
            CaptionerError: it refuses all, or does not answer after `num_tries`.
        """
        headers = {"Content-Type": "application/json"}
        if self.settings.api_key:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        request = urllib.request.Request(f"{self.settings.base_url.rstrip('/')}/chat/completions", body, headers)
        wait_seconds, reason = self.settings.first_wait_seconds, ""
        if self._stopped.is_set():
            raise CaptionerError(f"{self.name}: stopped")
        for number in range(self.settings.num_tries):
            asked_seconds = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_said(error)}"
                if error.code in ABOUT_THIS_REQUEST:
                    raise InputError(f"{self.name} refuses it ({reason})") from error
                if error.code not in TRY_AGAIN:
                    raise CaptionerError(f"{self.name}: {reason}; {_mend(error.code)}") from error
                asked_seconds = _seconds_to_wait(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # (ValueError: a body that is not JSON, from a proxy between)
                reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            if number + 1 < self.settings.num_tries:
                # A little chance keeps many makers from asking again at the same moment.
                if self._stopped.wait(max(asked_seconds, wait_seconds) * random.uniform(1.0, 1.25)):
                    break
                wait_seconds = min(60.0, 2 * wait_seconds)
        raise CaptionerError(
            f"{self.name}: no answer after {number + 1} tries, at last {reason}; start it, or run the same command again later"
        )


def _said(error: urllib.error.HTTPError) -> str:
    """The reason in an error's body, in one line."""
    text = error.read(4096).decode(errors="replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        # (not in OpenAI's shape: told as it is)
        text = text or str(error.reason)
    return " ".join(str(text).split())[:300]


def _mend(status: int) -> str:
    if status in (401, 403):
        return "put a valid key into the environment variable OPENAI_API_KEY"
    if status == 404:
        return "check the address (it ends with /v1) and --captioner-model"
    return "check --captioner and --captioner-model"


def _seconds_to_wait(error: urllib.error.HTTPError) -> float:
    """What the server asks for in Retry-After, at most a minute."""
    try:
        return min(60.0, max(0.0, float(error.headers.get("Retry-After", "0"))))
    except ValueError:
        # (the header may also hold a date)
        return 0.0
