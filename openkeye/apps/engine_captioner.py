"""A captioner that is a checkpoint in this process: the engine, as makers ask it."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import CaptionerError
from openkeye.data.makers.made_sample import Message
from openkeye.inputs.processor import resolve_model_dir

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine


class EngineCaptioner:
    """`openkeye.data.makers.captioner.Captioner` over an `Engine`, which answers one question at a time.

    The checkpoint is loaded with the first question: a run that has nothing left to do loads none.
    """

    def __init__(self, model: str, device: str | None, max_tokens: int) -> None:
        """InputError where there is no such checkpoint."""
        resolve_model_dir(model)
        self.name = model
        self._device = device
        self._max_tokens = max_tokens
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def caption(self, messages: Sequence[Message]) -> str:
        """The likeliest answer.

        Raises:
            InputError: media cannot be read, the prompt does not fit, or the answer was cut.
            CaptionerError: the checkpoint cannot be loaded, or it was stopped.
        """
        from openkeye.engine.config import SamplingParameters

        with self._lock:
            if self._stopped.is_set():
                raise CaptionerError(f"{self.name}: stopped")
            if self._engine is None:
                self._engine = self._load()
            answer = self._engine.generate(messages, sampling=SamplingParameters(max_new_tokens=self._max_tokens))
        if answer.finish_reason == "length":
            raise InputError(f"{self.name}: cut after {answer.num_generated_tokens} tokens; raise --captioner-max-tokens")
        return answer.text

    def stop(self) -> None:
        """No further question is answered."""
        self._stopped.set()

    def _load(self) -> "Engine":
        from openkeye.engine.loop import Engine

        try:
            return Engine(self.name, self._device)
        except InputError as error:
            # Not the fault of the medium that is asked about.
            raise CaptionerError(str(error)) from error
