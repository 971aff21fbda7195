"""The body of `/v1/chat/completions`, checked: a field that would change the answer and is not served is refused, not skipped.

Field names are those of the OpenAI API.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openkeye.apps.http_api.errors import ApiError
from openkeye.engine.config import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParameters

MAX_PARTS = {"image_url": 4096, "video_url": 64}
# of one request: each is opened before anything is known of the prompt's length

ReadMedia = Callable[[str], Any]
# from an address that a client gave to what `openkeye.inputs.messages` takes


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _WithOptions(BaseModel):
    """Options of a picture or a video stand beside its address; `openkeye.inputs.messages` knows their names."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Address(_WithOptions):
    """`{"url": ..., "fps": 1, ...}`"""

    url: str
    detail: str | None = None
    # (a hint of that API about sizes; max_pixels says it exactly)


class TextPart(_Checked):
    type: Literal["text"]
    text: str


class ImagePart(_WithOptions):
    type: Literal["image_url"]
    image_url: str | Address


class VideoPart(_WithOptions):
    type: Literal["video_url"]
    video_url: str | Address


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class FunctionCall(_Checked):
    name: str
    arguments: str


class ToolCall(_Checked):
    id: str | None = None
    index: int | None = None
    # (of a chunk: clients that put a streamed call together may leave it in)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Checked):
    """One turn. Answers may be sent back as they came, empty fields included."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class StreamOptions(_Checked):
    include_usage: bool = False
    include_obfuscation: bool = False
    # (padding against eavesdroppers on the lengths of tokens; it carries no meaning)


class FunctionDefinition(_Checked):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Checked):
    type: Literal["function"]
    function: FunctionDefinition


class ResponseFormat(_Checked):
    type: str


class ChatRequest(_Checked):
    """What a client asks for."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    # (not of the OpenAI API: how many of the likeliest tokens are kept, 0 for all)
    evidence: bool | None = None
    # (not of the OpenAI API: whether the answer tells which moments of its videos it rests on)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    # Taken where they say what happens anyway:
    n: int | None = None
    logit_bias: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    # Without meaning for the answer:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def takes_tool_calls(self) -> bool:
        """Whether `<tool_call>` in the answer is a call. A client that wants none reads it as text."""
        return self.tool_choice != "none"

    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        tools = self.tools if self.tools and self.tool_choice != "none" else []
        return [tool.model_dump(exclude_none=True) for tool in tools]

    def sampling(self, max_answer_tokens: int, default_answer_tokens: int) -> SamplingParameters:
        """How the answer's tokens are chosen; ApiError for a length that the server does not give."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        wanted = getattr(self, name)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        if wanted is not None and not 1 <= wanted <= max_answer_tokens:
            raise ApiError(400, f"{name} is {wanted}; give 1 to {max_answer_tokens}", name)
        temperature = self.temperature or 0.0
        return SamplingParameters(
            temperature=temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            # Asked for chance and given no seed, a client expects another answer each time.
            seed=self.seed if self.seed is not None else secrets.randbits(63) if temperature else 0,
            max_new_tokens=min(default_answer_tokens, max_answer_tokens) if wanted is None else wanted,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def parse_chat_request(body: bytes) -> ChatRequest:
    """The body as a record.

    Raises:
        ApiError: 400 with the field at fault.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # A field of several types has an error for each; the deepest is about the type that was meant.
        first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(found["loc"]))
        place = _place(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{place}: this field is unknown or not served; leave it out", place) from None
        raise ApiError(400, f"{place}: {first['msg']}" if place else f"the body: {first['msg']}", place or None) from None
    _refuse_what_is_not_served(request)
    return request


def _place(steps: tuple[int | str, ...]) -> str:
    """Where in the body an error is: pydantic's path without the names of its own types."""
    named = []
    for number, step in enumerate(steps):
        is_type = isinstance(step, str) and ("[" in step or step in ("str", "Address"))
        # Behind the number of a part in a list of parts stands the part's type, then its field.
        is_tag = number >= 2 and isinstance(steps[number - 1], int) and "[" in str(steps[number - 2])
        if not (is_type or is_tag):
            named.append(str(step))
    return ".".join(named)


def _refuse_what_is_not_served(request: ChatRequest) -> None:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    wrong = {
        "n": (request.n not in (None, 1), "only n=1 is served; send several requests"),
        "logit_bias": (bool(request.logit_bias), "logit_bias is not served; leave it out"),
        "frequency_penalty": (bool(request.frequency_penalty), "penalties are not served; leave it out or give 0"),
        "presence_penalty": (bool(request.presence_penalty), "penalties are not served; leave it out or give 0"),
        "response_format": (
            request.response_format is not None and request.response_format.type != "text",
            'only the response_format {"type": "text"} is served; ask for the form in words',
        ),
        "modalities": (request.modalities not in (None, ["text"]), 'only the modalities ["text"] are served'),
        "tool_choice": (
            request.tool_choice not in (None, "auto", "none"),
            "a tool cannot be forced; give tool_choice auto or none",
        ),
        "parallel_tool_calls": (
            request.parallel_tool_calls is False and bool(request.template_tools()),
            "the model may always call several tools; leave parallel_tool_calls out",
        ),
        "top_logprobs": (
            request.top_logprobs is not None and not request.logprobs,
            "top_logprobs needs logprobs true; give both",
        ),
        "stream_options": (
            request.stream_options is not None and not request.stream,
            "stream_options needs stream true; give both",
        ),
        "stop": (
            len(stops) > MAX_STOP_STRINGS or "" in stops,
            f"stop takes up to {MAX_STOP_STRINGS} texts, none of them empty",
        ),
    }
    for name, (is_wrong, reason) in wrong.items():
        if is_wrong:
            raise ApiError(400, f"{name}: {reason}", name, "unsupported_value")


def engine_messages(request: ChatRequest, read_media: ReadMedia, tokens_to_pixels: int) -> list[dict[str, Any]]:
    """The messages for the engine, every address of a medium replaced by what may be read.

    Args:
        tokens_to_pixels: pixels of one token of a picture, in which `budget` is counted.

    Raises:
        ApiError: an address that is not served, an option that makes no sense, or too many pictures or videos.
    """
    parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
    for kind, most in MAX_PARTS.items():
        number = sum(part.type == kind for part in parts)
        if number > most:
            raise ApiError(400, f"messages: {number:,} parts of type {kind}; give at most {most:,} in one request", "messages")
    return [_engine_message(message, read_media, tokens_to_pixels) for message in request.messages]


def _engine_message(message: Message, read_media: ReadMedia, tokens_to_pixels: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    # (templates of open models know no developer)
    if isinstance(message.content, list):
        plain["content"] = [_engine_part(part, read_media, tokens_to_pixels) for part in message.content]
    else:
        plain["content"] = message.content or ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return plain


def _template_call(call: ToolCall) -> dict[str, Any]:
    """Templates print arguments as JSON: they take an object, where the API has it as text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise ApiError(400, f"tool_calls: the arguments of {call.function.name} are not JSON ({error})", "messages") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _engine_part(part: TextPart | ImagePart | VideoPart, read_media: ReadMedia, tokens_to_pixels: int) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    address = part.image_url if isinstance(part, ImagePart) else part.video_url
    options = _flat_options(part.model_extra or {})
    if isinstance(address, Address):
        options |= _flat_options(address.model_extra or {})
        address = address.url
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float | None) or _is_no_number(value):
            raise ApiError(400, f"{part.type}: option {name} is {value!r:.80}; expected a number or a word", name)
    if isinstance(part, VideoPart) and "budget" in options:
        options["total_pixels"] = _budget_tokens(options.pop("budget")) * tokens_to_pixels
    kind = part.type.removesuffix("_url")
    return {"type": kind, kind: read_media(address), **options}


def _flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in one table: related servers take them in `preprocess_kwargs`."""
    flat = dict(options)
    nested = flat.pop("preprocess_kwargs", None) or {}
    if not isinstance(nested, dict):
        raise ApiError(400, f"preprocess_kwargs is {nested!r:.80}; expected a table of options", "preprocess_kwargs")
    return flat | nested


def _is_no_number(value: str | float | None) -> bool:
    """Infinite, or with more digits than any file has pixels."""
    return isinstance(value, int | float) and (not math.isfinite(value) or abs(value) > 1e15)


def _budget_tokens(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ApiError(400, f"video_url: budget is {value!r:.80}; give a number of tokens from 1 on", "budget")
    return value
