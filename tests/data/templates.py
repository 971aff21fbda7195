"""Chat templates in the manners of open models, for what a template may do to a conversation."""

import json
from pathlib import Path

from tests.inputs.checkpoint import write_checkpoint

THINKING = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set state = namespace(last_question=-1) %}
{%- for message in messages %}
{%- if message.role == "user" %}{% set state.last_question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == "assistant" %}<|im_start|>assistant
{% set reasoning = message.reasoning_content or "" %}
{%- if loop.index0 > state.last_question and (loop.last or reasoning) %}<think>
{{ reasoning }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Thinks behind the last question only, as Qwen3 does: earlier turns are rewritten, and the last answer always has a thought.

TURNS = """{{ bos_token }}{% for message in messages %}
{%- if message.learn is defined %}{{ raise_exception("what is this?") }}{% endif %}
[{{ message.role }}] {{ message.content }}<|endoftext|>
{%- endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
# Another end token without a line break behind it, a space at the seam, and no patience with unknown fields.

ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# A template without an end token.

FORGETFUL = (
    "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>Go{% endif %}"
)
# The generation prompt is in no rendered conversation.


def write_model(folder: Path, template: str) -> Path:
    """The folder of `tests.inputs.checkpoint` with a chat template."""
    write_checkpoint(folder)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
