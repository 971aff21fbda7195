"""Messages to prompt text through a checkpoint's chat template (jinja2)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openkeye.common.checks import InputError

DEFAULT_TEMPLATE = (
    "{% if messages and messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The multimodal template of the model's published siblings (spec: 4.5), for checkpoints that carry none.

MARK_START, MARK_END = "\ue000", "\ue001"
# Private-use characters around the number of a quoted special token while a template runs.


class ChatTemplate:
    """A compiled chat template. Render, then `split` the text into template pieces and quoted pieces."""

    def __init__(self, source: str, special_tokens: Sequence[str], extra: Mapping[str, Any] | None = None) -> None:
        """`special_tokens`: texts that must stay prose when a user writes them. `extra`: names the template may read."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        # Templates are written for this one; jinja's own writes <, >, & and ' as codes, for web pages.
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"chat template, line {error.lineno}: {error.message}; mend it in the checkpoint") from error
        self._extra = dict(extra or {})
        longest_first = sorted({*special_tokens, MARK_START, MARK_END}, key=len, reverse=True)
        self._quoted = re.compile("|".join(re.escape(token) for token in longest_first))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> list[tuple[str, bool]]:
        """Pieces (text, is_prose) of the prompt: prose pieces are special-token look-alikes that a user wrote.

        `messages` hold string contents or lists of parts; media parts become the template's placeholders. `options` are for
        the template (tools); users wrote them too.
        """
        quotes: list[str] = []

        def quote(match: re.Match[str]) -> str:
            quotes.append(match.group())
            return f"{MARK_START}{len(quotes) - 1}{MARK_END}"

        def quote_text(text: str) -> str:
            return self._quoted.sub(quote, text)

        quoted_messages, quoted_options = _map_texts(list(messages), quote_text), _map_texts(options, quote_text)
        try:
            text = self._template.render(
                messages=quoted_messages, add_generation_prompt=add_generation_prompt, **{**self._extra, **quoted_options}
            )
        except (jinja2.TemplateError, TypeError) as error:
            # (a TypeError: fields of another type than the template adds up)
            raise InputError(f"the chat template refuses these messages: {error}") from error
        pieces: list[tuple[str, bool]] = []
        for number, piece in enumerate(re.split(f"{MARK_START}(\\d+){MARK_END}", text)):
            if piece:
                pieces.append((quotes[int(piece)], True) if number % 2 else (piece, False))
        return pieces


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same with `change` applied to every text in it, names of fields too: whatever a template may print."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, change) for item in value]
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
