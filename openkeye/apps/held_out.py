"""Held-out samples answered and scored: how often word for word, and how likely the model finds the true answers."""

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from openkeye.common.checks import InputError, writing_to
from openkeye.data.document import Document
from openkeye.data.sample import Sample
from openkeye.data.sources.opening import open_source
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.train.config import RunConfig

MAX_QUESTIONS = 200
# of all sources together; more would keep a person waiting
EXTRA_TOKENS = 32
# that an answer may be longer than the true one before it is cut
CACHE_TOKENS = 65_536
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """Of one model on the held-out questions."""

    num_questions: int
    exact_share: float
    # of answers that are the true ones, spaces at the ends aside
    loss: float
    # mean negative log-probability of a true answer's tokens, in nats

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """What `save` wrote."""
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Write a JSON file; InputError where the folder cannot be written."""
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self)) + "\n")

    def text(self) -> str:
        """In words."""
        return f"{self.exact_share:.0%} of {self.num_questions} answers exact, loss {self.loss:.3g}"


def score_sources(config: RunConfig, model_dir: str, say: Callable[[str], None]) -> Scores | None:
    """Ask a model what the sources of `config.evaluates` ask, each question apart; None where they ask nothing.

    Raises:
        InputError: a source or a model that cannot be opened.
    """
    pairs = list(_questions(config))
    if len(pairs) > MAX_QUESTIONS:
        say(f"{MAX_QUESTIONS} of {len(pairs)} held-out questions are asked, evenly chosen")
        pairs = [pairs[number * len(pairs) // MAX_QUESTIONS] for number in range(MAX_QUESTIONS)]
    if not pairs:
        return None
    say(f"asking {model_dir} {len(pairs)} held-out questions")
    longest = max(stage.context for stage in config.stages)
    page = EngineConfig.page_size
    cache_tokens = max(CACHE_TOKENS, -(-(longest + 4 * page) // page) * page)
    engine = Engine(model_dir, attention=config.stages[-1].attention, config=EngineConfig(cache_tokens=cache_tokens))
    num_exact, loss, num_tokens = 0, 0.0, 0
    for prompt, answer in pairs:
        sampling = SamplingParameters(max_new_tokens=len(engine.processor.encode_text(answer)) + EXTRA_TOKENS)
        num_exact += engine.generate(prompt, sampling=sampling).text.strip() == answer.strip()
        logprobs = [logprob for _, _, logprob in engine.score(prompt, answer)]
        loss -= sum(logprobs)
        num_tokens += len(logprobs)
    # The caches and weights are wanted back before training begins.
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Scores(len(pairs), num_exact / len(pairs), loss / num_tokens)


def _questions(config: RunConfig) -> Iterable[tuple[Sequence[Message], str]]:
    """(messages before the last answer, that answer) of every sample and branch."""
    for name in config.evaluates:
        if name not in config.sources:
            raise InputError(f"evaluates names {name!r}; sources has {', '.join(config.sources)}: add it there")
        source = open_source(name, config.sources[name], config.model_dir)
        if source.num_samples is None:
            raise InputError(f"evaluates names {name!r}, a source without end; give one with a number of samples")
        for index in range(source.num_samples):
            sample = source.read(index)
            if isinstance(sample, Document):
                raise InputError(f"evaluates names {name!r}, which hands out finished documents; give a source of chats")
            for messages in conversations(sample):
                last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
                answer = messages[last].get("content")
                if isinstance(answer, str) and answer.strip():
                    yield messages[:last], answer


def conversations(sample: Sample) -> list[Sequence[Message]]:
    """A sample's branches, each with what stands before it; the sample's own messages where it has none.

    A branch that goes on in the turn of the user whose message shows the video becomes one turn with it.
    """
    trunk = [_with_options(message, sample.video_options) for message in sample.messages]
    whole: list[Sequence[Message]] = []
    for branch in sample.branches:
        if trunk[-1]["role"] == branch[0]["role"] == "user":
            content = [*_parts(trunk[-1]["content"]), *_parts(branch[0]["content"])]
            whole.append([*trunk[:-1], {**trunk[-1], "content": content}, *branch[1:]])
        else:
            whole.append([*trunk, *branch])
    return whole or [trunk]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _with_options(message: Message, options: Mapping[str, Any]) -> Message:
    """The sample's limits of videos written into the message's parts, whose own win."""
    if not options or isinstance(message["content"], str):
        return message
    parts = [{**options, **part} if part.get("type") == "video" else part for part in message["content"]]
    return {**message, "content": parts}
