"""A captioner that is a checkpoint in this process: the engine, as makers ask it."""

import threading
from collections.abc import Sequence

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import CaptionerError
from openkeye.data.makers.made_sample import Message
from openkeye.engine.config import SamplingParameters
from openkeye.engine.loop import Engine


class EngineCaptioner:
    """`openkeye.data.makers.captioner.Captioner` over an `Engine`, one question at a time."""

    def __init__(self, engine: Engine, name: str, max_tokens: int) -> None:
        self.name = name
        self._engine = engine
        self._sampling = SamplingParameters(max_new_tokens=max_tokens)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def caption(self, messages: Sequence[Message]) -> str:
        """The likeliest answer.

        Raises:
            InputError: media cannot be read, the prompt does not fit, or the answer was cut.
            CaptionerError: it was stopped.
        """
        with self._lock:
            if self._stopped.is_set():
                raise CaptionerError(f"{self.name}: stopped")
            answer = self._engine.generate(messages, sampling=self._sampling)
        if answer.finish_reason == "length":
            raise InputError(f"{self.name}: cut after {answer.num_generated_tokens} tokens; raise --captioner-max-tokens")
        return answer.text

    def stop(self) -> None:
        """No further question is answered."""
        self._stopped.set()
