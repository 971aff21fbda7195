"""Several questions about one video: it is decoded and encoded once, and later questions reuse its place in the cache.

python examples/several_questions.py [VIDEO]
"""

import sys

from openkeye import Engine

conversation = Engine("openkeye-tiny").open(sys.argv[1] if len(sys.argv) > 1 else "openkeye/media/demo.mp4")
for question in (
    "When is the red circle visible?",
    "What word can be read at 6.1 seconds?",
    "Is there a moment with both the purple digit 9 and the orange triangle?",
):
    answer = conversation.ask(question)
    print(f"{question}\n  {answer.text}  ({answer.num_cached_tokens} of {answer.num_prompt_tokens} tokens from the cache)")
