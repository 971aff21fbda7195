"""References for failed groups that are asked again: questions with a mistake report behind them, and their sound solutions.

    python -m recipes.post_training.retries retries.jsonl 8000 seed=1

Without some of them the small model does not know what to do with a report. Attempts are references with an unsound step, or
with none; they are reported on by rules and not shown, since an attempt in a chat would be learnt as well.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openkeye.apps.task_words import task_from
from openkeye.rl.context_rl import with_report
from openkeye.rl.roles import AskedAgain
from openkeye.tasks.mistake_reports import Attempt, RuleArithmeticReporter, checked_report
from openkeye.tasks.rewards.reading import answer_text, reasoning_text
from openkeye.tasks.task import Response


def retry_chats(num: int, words: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Chats about the first `num` questions of the task, but for those of which no report says anything without the answer.

    Args:
        words: options of the task `arithmetic`.
    """
    sound, unsound = task_from("arithmetic", words), task_from("arithmetic", [*words, "unsound_share=1.0"])
    for number in range(num):
        example, attempt = sound.read(number), str(unsound.read(number).facts["reference"])
        response = Response(attempt)
        failed = Attempt(reasoning_text(response), answer_text(response))
        report = asyncio.run(checked_report(RuleArithmeticReporter(), example, failed)).text
        if report is not None:
            asked = with_report(example, AskedAgain(attempt, report), shows_attempt=False)
            yield {
                "messages": [*asked.messages, {"role": "assistant", "content": example.facts["reference"]}],
                "task": "retries",
            }


def main(words: Sequence[str]) -> None:
    """FILE NUM [option=value ...]"""
    path, num, *options = words
    with Path(path).open("w") as file:
        for chat in retry_chats(int(num), options):
            file.write(json.dumps(chat) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
