"""`HttpModelClient`: a model behind an OpenAI-compatible HTTP API."""

import asyncio
import base64
import io
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openkeye.agents.model_client import Message, ModelReply
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    import httpx

TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# statuses of a server that is busy or failing
MAX_WAIT_SECONDS = 60.0
MAX_REPLY_BYTES = 16 << 20


@dataclass(frozen=True)
class HttpModelSettings:
    """Where the model is and how it is asked."""

    base_url: str
    # up to and with /v1
    model: str
    key_variable: str = "OPENAI_API_KEY"
    # environment variable that holds the key; it may be unset for a server of one's own
    sampling: Mapping[str, Any] = field(default_factory=dict)
    # temperature, max_tokens, ...: sent as they are
    timeout_seconds: float = 120.0
    # of one try, from its beginning to its end
    num_tries: int = 5
    first_wait_seconds: float = 1.0
    # doubled from try to try, up to a minute
    max_at_once: int = 16
    # requests under way

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"{self.base_url!r}: not an address of an API; give one such as https://HOST/v1")
        if not self.model:
            raise InputError(f"{self.base_url}: which of its models? give its name")
        if self.num_tries < 1 or self.max_at_once < 1:
            raise InputError(f"{self.model}: num_tries {self.num_tries}, max_at_once {self.max_at_once}; give 1 or more")
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise InputError(f"{self.model}: timeout_seconds is {self.timeout_seconds}; give a time above 0")


class HttpModelClient:
    """See `ModelClient`. Busy servers are asked again with growing waits; what they refuse for good is an error.

    One instance belongs to one event loop. It can be pickled while nothing is under way: connections are opened anew.
    """

    def __init__(self, settings: HttpModelSettings, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        self.settings = settings
        self._transport = transport
        # in place of the network
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_transport": self._transport, "_client": None, "_slots": None}

    @property
    def name(self) -> str:
        """The model's name at its address."""
        return f"{self.settings.model} at {self.settings.base_url}"

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> ModelReply:
        """See `ModelClient.reply`. A reply that no chat API would give is an `OSError` as well: the model is not there."""
        body = {
            "model": self.settings.model,
            "messages": [_sendable(message) for message in messages],
            **self.settings.sampling,
        }
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        content = json.dumps(body).encode()
        if self._slots is None:
            self._slots = asyncio.Semaphore(self.settings.max_at_once)
        async with self._slots:
            return _model_reply(await self._post(content), self.name)

    async def close(self) -> None:
        """Close the connections; may be called twice."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _post(self, content: bytes) -> Any:
        """The reply as JSON.

        Raises:
            InputError: the API refuses this request.
            OSError: it refuses all, or does not answer after `num_tries`.
        """
        wait_seconds, reason = self.settings.first_wait_seconds, ""
        for number in range(self.settings.num_tries):
            if number:
                # A little chance keeps many callers from asking again at the same moment.
                await asyncio.sleep(min(MAX_WAIT_SECONDS, wait_seconds) * random.uniform(1.0, 1.25))
            status, text, asked_seconds = await self._try(content)
            if status == 200:
                try:
                    return json.loads(text)
                except (ValueError, RecursionError):
                    # (from a proxy between)
                    status, text = 0, "a body that is not JSON"
            reason = f"HTTP {status}: {_said(text)}" if status else text
            if status in (400, 413, 415, 422):
                raise InputError(f"{self.name} refuses the conversation ({reason}); shorten or mend it")
            if status and status not in TRY_AGAIN:
                raise OSError(f"{self.name}: {reason}; {self._mend(status)}")
            wait_seconds = max(asked_seconds, 2 * wait_seconds if number else wait_seconds)
        raise OSError(f"{self.name}: no answer after {self.settings.num_tries} tries, at last {reason}")

    async def _try(self, content: bytes) -> tuple[int, str, float]:
        """(status, body, seconds to wait for that the server asks for); status 0 where there was no whole answer in time."""
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(transport=self._transport, timeout=self.settings.timeout_seconds)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        try:
            # httpx limits the time between two bytes; a server that drips is limited here.
            async with asyncio.timeout(self.settings.timeout_seconds):
                async with self._client.stream("POST", url, content=content, headers=headers) as response:
                    body = b""
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > MAX_REPLY_BYTES:
                            return 0, f"more than {MAX_REPLY_BYTES} bytes", 0.0
                    return response.status_code, body.decode(errors="replace"), _seconds(response.headers.get("Retry-After"))
        except TimeoutError:
            return 0, f"nothing whole in {self.settings.timeout_seconds:g} s", 0.0
        except httpx.HTTPError as error:
            return 0, str(error) or type(error).__name__, 0.0

    def _mend(self, status: int) -> str:
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.settings.key_variable}"
        return "check the address (it ends with /v1) and the model's name"


def _seconds(header: str | None) -> float:
    try:
        return min(MAX_WAIT_SECONDS, max(0.0, float(header or 0)))
    except ValueError:
        # (the header may also hold a date)
        return 0.0


def _said(text: str) -> str:
    """The reason in an error's body, in one line."""
    try:
        text = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        # (not in OpenAI's shape: told as it is)
        text = text or "nothing said"
    return " ".join(text.split())[:300]


def _sendable(message: Message) -> dict[str, Any]:
    """A message as JSON can hold it: pictures become data URLs, arguments of calls text."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [_sendable_part(part) for part in content]
    sent = {**message, "content": content}
    if "tool_calls" in message:
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return sent


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _sendable_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") != "image" or isinstance(part.get("image"), Mapping):
        return part
    from openkeye.inputs.image import open_image

    file = io.BytesIO()
    open_image(part["image"]).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _model_reply(body: Any, name: str) -> ModelReply:
    try:
        choice = body["choices"][0]
        message = choice["message"]
        calls = message.get("tool_calls") or []
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str) or not isinstance(calls, list):
            raise TypeError("content, reasoning and tool_calls")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise OSError(f"{name}: the reply has no choices[0].message in OpenAI's form ({error}); is it a chat API?") from error
    if not reasoning and text.lstrip().startswith("<think>") and "</think>" in text:
        thought, _, text = text.partition("</think>")
        reasoning = thought.replace("<think>", "", 1)
    good: list[Mapping[str, Any]] = []
    malformed: list[str] = []
    for number, call in enumerate(calls):
        read = _tool_call(call, number)
        if read is None:
            malformed.append(json.dumps(call)[:2000])
        else:
            good.append(read)
    reason = str(choice.get("finish_reason") or "stop")
    finish = reason if reason in ("stop", "length", "tool_calls") else "stop"
    details = {"usage": body.get("usage") or {}, "finish_reason": reason}
    return ModelReply(text.strip(), reasoning.strip(), tuple(good), finish, tuple(malformed), details)


def _tool_call(call: Any, number: int) -> Mapping[str, Any] | None:
    """A call as `ModelReply.tool_calls` holds it; None where it cannot be read."""
    try:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        key = str(call.get("id") or f"call_{number}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None
    return {"id": key, "name": name, "arguments": value} if isinstance(name, str) and isinstance(value, dict) else None
