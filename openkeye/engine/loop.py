"""The engine: add requests, step, collect answers. Open this file first.

from openkeye import Engine
Engine("openkeye-tiny").ask("clip.mp4", "When does the red circle appear?")
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.answer import Answer
from openkeye.engine.answering import Message
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.evidence import EvidenceCounts
from openkeye.engine.moments import read_evidence
from openkeye.engine.parallel import ModelSettings, open_runner
from openkeye.engine.request import Request
from openkeye.engine.sampler import chosen_logprobs, sample_batch, token_logprobs
from openkeye.engine.scheduler import Scheduler
from openkeye.engine.scores import score_output
from openkeye.engine.text_stream import TextStream
from openkeye.inputs.encode import lay_out
from openkeye.inputs.intervals import parse_intervals, widen_intervals
from openkeye.inputs.processor import Processor, read_json, resolve_model_dir
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import Frames, Progress, read_video
from openkeye.inputs.video_scan import VideoScan

OnText = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]
# called with (stage, done, total); stages are decode_video and prefill


class Engine:
    """A checkpoint with its caches. Not safe for use from several threads at once."""

    def __init__(
        self,
        model: str | Path = "openkeye-tiny",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "sparse",
        config: EngineConfig | None = None,
    ) -> None:
        """Load a checkpoint; rank 0 of several (torchrun) loads it together with the others, which `parallel.follow`.

        Args:
            model: `openkeye-tiny` or a folder in the published layout.
            device: default a CUDA GPU where there is one, else the CPU.
            dtype: default bf16 on a GPU, fp32 on the CPU.
            attention: "sparse" as the model was trained, or "dense".

        Raises:
            InputError: the folder is not a checkpoint that this code can run.
        """
        if attention not in ("sparse", "dense"):
            raise InputError(f"attention is {attention!r}; choose sparse or dense")
        self.model_dir = resolve_model_dir(model)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.processor = Processor.load(self.model_dir)
        self.runner = open_runner(ModelSettings(str(self.model_dir), self.device, dtype, attention, config or EngineConfig()))
        self.config = self.runner.config
        self.scheduler = Scheduler(self.config, self.device)
        self.stop_ids = self._read_stop_ids()
        self.version = 0
        # of the weights: `weight_update.apply_update` raises it

    def ask(
        self,
        video: str | Path | VideoScan | Frames,
        question: str,
        *,
        fps: float | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        total_tokens: int | None = None,
        sampling: SamplingParameters | None = None,
        on_text: OnText | None = None,
        on_progress: OnProgress | None = None,
        evidence: bool = False,
    ) -> Answer:
        """Answer one question about a video file, or the part of it from start to end.

        A file is decoded while its frames are read, and never whole in memory; for more questions about it see `open`.
        total_tokens: the video's budget, its frames' times aside; fewer frames are taken where it is too small for all.
        evidence: whether the answer tells what it rests on (`Answer.evidence`).

        Raises:
            InputError: the video cannot be read, or the prompt does not fit.
        """
        options: dict[str, Any] = {"sampling": sampling, "on_text": on_text, "on_progress": on_progress, "evidence": evidence}
        if isinstance(video, Frames):
            return self.open(video, start_seconds=start_seconds, end_seconds=end_seconds).ask(question, **options)
        _check_question(question)
        part = {"type": "video", "video": video, "fps": fps, "start": start_seconds, "end": end_seconds}
        if total_tokens is not None:
            limits = self.processor.video_limits.changed(total_tokens=total_tokens)
            part["total_pixels"] = limits.total_tokens * limits.factor**2
        messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        answer = self.generate(messages, **options)
        window = (start_seconds or 0.0, math.inf if end_seconds is None else end_seconds)
        return replace(answer, intervals_seconds=_clipped(answer.intervals_seconds, window))

    def ask_many(
        self, video: str | Path | Frames, questions: Sequence[str], *, fps: float | None = None, **options: Any
    ) -> list[Answer]:
        """Independent answers to several questions about one video, which is decoded and encoded once."""
        return self.open(video, fps=fps).ask_many(questions, **options)

    def open(
        self,
        video: str | Path | Frames,
        *,
        fps: float | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        total_tokens: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> "Conversation":
        """Decode a video once, for any number of questions; its frames stay in memory, a byte a colour."""
        start = time.monotonic()
        if not isinstance(video, Frames):
            limits = self.processor.video_limits.changed(fps=fps, total_tokens=total_tokens)
            report = None if on_progress is None else (lambda done, total: on_progress("decode_video", done, total))
            video = read_video(video, limits, start_seconds, end_seconds, report)
        window = (start_seconds or 0.0, video.duration_seconds if end_seconds is None else end_seconds)
        return Conversation(self, video, window, time.monotonic() - start)

    def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: SamplingParameters | None = None,
        on_text: OnText | None = None,
        on_progress: OnProgress | None = None,
        evidence: bool = False,
    ) -> Answer:
        """Continue a chat whose messages may hold text, pictures and videos (see `openkeye.inputs.messages`)."""
        batch = [messages]
        return self.generate_batch(batch, sampling=sampling, on_text=on_text, on_progress=on_progress, evidence=evidence)[0]

    def generate_batch(
        self,
        batch: Sequence[Sequence[Message]],
        *,
        sampling: SamplingParameters | None = None,
        on_text: OnText | None = None,
        on_progress: OnProgress | None = None,
        evidence: bool = False,
    ) -> list[Answer]:
        """Answers to several chats, decoded together. `on_text` streams the first one's, and `on_progress` follows it.

        Raises:
            InputError: unreadable media, found before or while videos are decoded, or a prompt that does not fit.
        """
        report = None if on_progress is None else (lambda done, total: on_progress("decode_video", done, total))
        requests = [
            self.prepare(messages, sampling or SamplingParameters(), None if number else report, evidence)
            for number, messages in enumerate(batch)
        ]
        if not requests:
            return []
        first = requests[0]
        if on_text is not None:
            first.on_token = lambda event: on_text(event.text) if event.text else None
        if on_progress is not None:
            first.on_prefill = lambda done, total: on_progress("prefill", done, total)
        try:
            for request in requests:
                self.scheduler.add(request)
            while self.scheduler.has_work:
                if first in self.step() and on_text is not None and first.rest:
                    on_text(first.rest)
        finally:
            # After an error or Ctrl-C nothing half done stays behind for the next call.
            self.scheduler.clear()
        return [self.answer(request) for request in requests]

    def score(self, messages: Sequence[Message], continuation: str) -> list[tuple[int, str, float]]:
        """How likely the model finds a given answer: (token id, its text, natural logarithm of its probability) of each token.

        Logarithms are of the model's own logits in float32. The continuation is read as prose, and the end of the turn is not
        part of it. Not while other requests run.

        Raises:
            InputError: an empty continuation, or one that does not fit behind the messages.
        """
        tokens = self.processor.encode_text(continuation)
        if not tokens:
            raise InputError("the continuation to score is empty; give at least one character")
        prompt = lay_out(messages, self.processor, num_reserved_tokens=len(tokens))
        request = self._request(prompt, SamplingParameters(max_new_tokens=len(tokens)))
        try:
            logprobs = score_output(self.runner, self.scheduler, request, tokens)
        finally:
            self.scheduler.clear()
        texts = [self.processor.decode([token], skip_special_tokens=False) for token in tokens]
        return list(zip(tokens, texts, logprobs, strict=True))

    def prepare(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        on_decoded: Progress | None = None,
        evidence: bool = False,
        **template_options: Any,
    ) -> Request:
        """Lay messages out into a request for `scheduler.add`; its video files are decoded when it runs. Safe on any thread.

        on_decoded: called on a decoding thread with (video frames done, in all); what it raises ends the decoding.
        evidence: whether its batches count what the answer rests on.
        template_options: what the chat template is given beside the messages.

        Raises:
            InputError: unreadable media, or a prompt past the model's context or the cache; then nothing was decoded.
        """
        start = time.monotonic()
        context, cache = self.processor.max_tokens, self.scheduler.pool.num_pages * self.config.page_size
        # An answer is cut where the context ends, but one that the cache cannot hold whole is never begun.
        is_cache_less = context is None or cache < context
        prompt = lay_out(
            messages,
            self.processor,
            num_reserved_tokens=sampling.max_new_tokens if is_cache_less else min(sampling.max_new_tokens, 64),
            max_tokens=cache if is_cache_less else context,
            **template_options,
        )
        request = self._request(prompt, sampling, on_decoded)
        request.stage_seconds["decode_video"] = time.monotonic() - start
        if evidence:
            request.evidence = EvidenceCounts(request.num_prompt)
        return request

    def step(self) -> list[Request]:
        """Run one batch, waiting for frames where none can run without; returns the requests that it finished.

        Raises:
            InputError: a video of a running request cannot be decoded.
        """
        return self.run_batch(self.scheduler.wait_for_batch())

    def run_batch(self, batch: Batch) -> list[Request]:
        """Run a batch of the scheduler's, give each request its next token; returns the requests that are finished now."""
        start, self.runner.vision_seconds = time.monotonic(), 0.0
        logits = self.runner.run(batch)
        for segment in batch.segments:
            segment.request.num_computed += segment.count
        # A prompt's chunk that is not its last says nothing yet.
        rows = [row for row, segment in enumerate(batch.segments) if not segment.request.num_missing]
        requests = [batch.segments[row].request for row in rows]
        logits = logits[rows]
        tokens = sample_batch(logits, [r.sampling for r in requests], [r.draw for r in requests])
        self._count_seconds(batch, time.monotonic() - start)
        for segment in batch.segments:
            self._tell_prefill(segment)
        self._record(requests, logits, tokens)
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            request.add_output(token, *token_logprobs(logits[row], token, request.sampling.logprobs))
        finished = [request for request in requests if request.finish_reason is not None]
        for request in finished:
            self.keep_routes(request)
            self.scheduler.remove(request)
        return finished

    def keep_routes(self, request: Request) -> None:
        """Take a running request's routes out of the pages, into its record, where both are kept."""
        slots = self.scheduler.slots.get(id(request))
        if self.runner.routes is not None and request.record is not None and slots is not None:
            request.record.keep_routes(self.runner.routes.read(slots[: request.num_computed]))

    def _record(self, requests: list[Request], logits_BV: Tensor, tokens: list[int]) -> None:
        """Keep what was sampled for those that are a policy's."""
        rows = [row for row, request in enumerate(requests) if request.record is not None]
        if not rows:
            return
        for row, logprob in zip(rows, chosen_logprobs(logits_BV[rows], [tokens[row] for row in rows]), strict=True):
            record = requests[row].record
            assert record is not None
            record.add(tokens[row], logprob, self.version)

    def answer(self, request: Request) -> Answer:
        """What a finished request has to say."""
        text = request.text
        frames = request.prompt.frames
        times = frames.times_seconds if frames is not None else []
        spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        window = (0.0, frames.duration_seconds if frames is not None else float("inf"))
        assert request.finish_reason is not None
        seconds = request.stage_seconds | {"decode_video": request.stage_seconds["decode_video"] + request.media.decode_seconds}
        return Answer(
            text,
            widen_intervals(parse_intervals(text), spacing, *window),
            request.num_prompt,
            request.num_cached,
            len(request.output_ids),
            len(times),
            spacing,
            seconds,
            request.finish_reason,
            request.media.notes,
            read_evidence(request, self.processor),
        )

    def _request(self, prompt: Prompt, sampling: SamplingParameters, on_decoded: Progress | None = None) -> Request:
        room = (self.processor.max_tokens or prompt.num_tokens + sampling.max_new_tokens) - prompt.num_tokens
        sampling = replace(sampling, max_new_tokens=max(1, min(room, sampling.max_new_tokens)))
        stream = TextStream(self.processor.decode, sampling.stop)
        return Request(prompt, sampling, self.stop_ids, stream, on_decoded=on_decoded)

    def _tell_prefill(self, segment: Segment) -> None:
        request = segment.request
        is_prompt = segment.start < request.num_prompt
        if is_prompt or request.keeps_answer:
            self.scheduler.keep_full_pages(request, segment.start)
        if is_prompt and request.on_prefill is not None:
            request.on_prefill(min(request.num_computed, request.num_prompt), request.num_prompt)

    def _count_seconds(self, batch: Batch, seconds: float) -> None:
        """A batch's time counts for each of its requests; the vision tower's for those that read a prompt."""
        for segment in batch.segments:
            is_prompt = segment.start < segment.request.num_prompt
            spent = segment.request.stage_seconds
            spent["prefill" if is_prompt else "generate"] += seconds - self.runner.vision_seconds
            spent["encode_vision"] += self.runner.vision_seconds * is_prompt

    def _read_stop_ids(self) -> frozenset[int]:
        path = self.model_dir / "generation_config.json"
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        if eos is None:
            eos = self.runner.model.config.eos_token_id
        return frozenset(eos if isinstance(eos, list) else [eos])


class Conversation:
    """Questions about one decoded video. Its frames are encoded and prefilled once, however many questions follow."""

    def __init__(self, engine: Engine, frames: Frames, window: tuple[float, float], decode_seconds: float) -> None:
        self.engine = engine
        self.frames = frames
        self.window = window
        # asked part of the video, seconds
        self.decode_seconds = decode_seconds

    def ask(self, question: str, **options: Any) -> Answer:
        """One more question, independent of the earlier ones. Options: those of `Engine.generate_batch`."""
        return self.ask_many([question], **options)[0]

    def ask_many(self, questions: Sequence[str], **options: Any) -> list[Answer]:
        """Several questions at once, answered in one batch."""
        for question in questions:
            _check_question(question)
        answers = self.engine.generate_batch([self._messages(question) for question in questions], **options)
        return [self._placed(answer) for answer in answers]

    def _messages(self, question: str) -> list[Message]:
        return [{"role": "user", "content": [{"type": "video", "video": self.frames}, {"type": "text", "text": question}]}]

    def _placed(self, answer: Answer) -> Answer:
        """The answer with this conversation's decoding time, its intervals clipped to the asked part."""
        intervals = _clipped(answer.intervals_seconds, self.window)
        seconds = answer.stage_seconds | {"decode_video": self.decode_seconds}
        # The video was decoded once: only the first answer's time includes it.
        self.decode_seconds = 0.0
        return Answer(**(vars(answer) | {"intervals_seconds": intervals, "stage_seconds": seconds}))


def _check_question(question: str) -> None:
    if not question.strip():
        raise InputError("the question is empty; ask something about the video")


def _clipped(intervals: list[tuple[float, float]], window: tuple[float, float]) -> list[tuple[float, float]]:
    """The intervals inside the asked part of a video, seconds."""
    low, high = window
    return [(max(low, first), min(high, last)) for first, last in intervals]
