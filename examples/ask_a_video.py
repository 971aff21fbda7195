"""One question about one video, from Python.

python examples/ask_a_video.py [VIDEO] [QUESTION]
"""

import sys

from openkeye import Engine

video = sys.argv[1] if len(sys.argv) > 1 else "openkeye/media/demo.mp4"
question = sys.argv[2] if len(sys.argv) > 2 else "When is the red circle visible?"

answer = Engine("openkeye-tiny").ask(video, question, on_text=lambda piece: print(piece, end="", flush=True))
print()
for first, last in answer.intervals_seconds:
    print(f"  {first:.2f} s to {last:.2f} s")
print(f"{answer.num_frames} frames, {answer.num_prompt_tokens} tokens; seconds by stage: {answer.stage_seconds}")
