"""The process that compares mathematical answers (`maths.py`): started as `python -m openkeye.tasks.rewards.maths_worker`."""

import sys
from typing import Any

from openkeye.tasks.rewards.limited_worker import serve


def compare(request: Any) -> dict[str, bool]:
    """Whether an answer equals the gold one, which comes first: math-verify is not symmetric."""
    from math_verify import parse, verify

    # Its own time limits are alarms that a library in C does not see; ours ends the process.
    gold = parse(_marked(request["gold"]), parsing_timeout=None)
    answer = parse(request["answer"], parsing_timeout=None) or parse(_marked(request["answer"]), parsing_timeout=None)
    is_right = bool(gold and answer) and verify(gold, answer, timeout_seconds=None)
    return {"is_right": bool(is_right), "is_gold_read": bool(gold), "is_answer_read": bool(answer)}


def _marked(text: str) -> str:
    """Bare LaTeX is found only between dollars."""
    return text if "$" in text or "\\boxed" in text else f"${text}$"


if __name__ == "__main__":
    import math_verify  # noqa: F401  (imported before the clock of the first request runs)

    serve(compare, float(sys.argv[1]), int(sys.argv[2]))
