"""Whether a teacher reads what the student has read: checked before it is asked, so that nothing unlike is compared in silence.

Prompt and response are tokenised apart. The teacher's prompt is written by its own processor, with its own template; the
response's tokens are the student's, joined by id, so that no merge of a tokenizer crosses the seam (report, SPRR).
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from openkeye.agents.model_client import Message
from openkeye.distill.scored import Scored
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Prompt
from openkeye.rl.policy_engine import lay_out_prompt
from openkeye.rl.rollout import Rollout
from openkeye.tasks.task import Example

MISMATCHES = (
    "unreadable",
    # the teacher's processor refuses the messages
    "student_prompt",
    # the student's processor writes another prompt than the rollout had
    "vocabulary",
    "special_tokens",
    "pictures",
    # another number of stills or frames
    "tokens_per_picture",
    "frame_times",
    "modality_boundaries",
    # pictures and frames in another order, or joined where the student has text between them
    "positions",
    "not_finite",
    # the teacher's log-probabilities
)
# why a sample is dropped


@dataclass(frozen=True)
class TokenizerIdentity:
    """Equal for tokenizers under which ids mean the same."""

    vocabulary: str
    special_tokens: str
    # hashes

    @classmethod
    def of(cls, processor: Processor) -> "TokenizerIdentity":
        """Of a checkpoint's tokenizer, by its content and never by its name."""
        vocabulary = processor.tokenizer.vocabulary()
        special = {token: vocabulary[token] for token in processor.tokenizer.special_tokens}
        media = {"image": processor.image_token_id, "video": processor.video_token_id}
        return cls(_hash(vocabulary), _hash(special | media))


def _hash(ids: Mapping[str, int]) -> str:
    return hashlib.blake2b(repr(sorted(ids.items())).encode(), digest_size=16).hexdigest()


class PromptReader(Protocol):
    """Writes prompts as one model sees them."""

    @property
    def identity(self) -> TokenizerIdentity: ...

    async def read(self, example: Example) -> Prompt:
        """The prompt of an example, with its pictures decoded.

        Raises:
            InputError: this model cannot read it.
        """
        ...


class ProcessorReader:
    """`PromptReader` of a checkpoint."""

    def __init__(self, processor: Processor) -> None:
        self.identity = TokenizerIdentity.of(processor)
        self._processor = processor

    async def read(self, example: Example) -> Prompt:
        """See `PromptReader.read`. The opening of an episode is that of its environment, which begins anew."""
        messages: Sequence[Message] = example.messages
        tools = example.tools
        if example.environment is not None:
            opening = await example.environment.reset()
            messages, tools = opening.messages, opening.tools
        # Without patches: pixels are for whoever computes.
        return await asyncio.to_thread(lay_out_prompt, messages, self._processor, tools)


def find_mismatch(
    student: Prompt, teacher: Prompt, student_identity: TokenizerIdentity, teacher_identity: TokenizerIdentity
) -> str | None:
    """The first of MISMATCHES between what two models see; None where they see the same.

    Templates may differ, and so may the number of text tokens; what is compared stands whatever the template writes around it.
    """
    if student_identity.vocabulary != teacher_identity.vocabulary:
        return "vocabulary"
    if student_identity.special_tokens != teacher_identity.special_tokens:
        return "special_tokens"
    if len(student.pictures) != len(teacher.pictures):
        return "pictures"
    if [one.num_tokens for one in student.pictures] != [one.num_tokens for one in teacher.pictures]:
        return "tokens_per_picture"
    if [video.times_seconds for video in student.videos] != [video.times_seconds for video in teacher.videos]:
        return "frame_times"
    if modality_runs(student) != modality_runs(teacher):
        return "modality_boundaries"
    own, given = (prompt.model_input for prompt in (student, teacher))
    if own.rope_delta != given.rope_delta or any(
        not torch.equal(_steps(student, number), _steps(teacher, number)) for number in range(len(student.pictures))
    ):
        return "positions"
    return None


def modality_runs(prompt: Prompt) -> list[str]:
    """What follows what: "text", "image" and "frame", neighbours of text as one run."""
    runs: list[str] = []
    place = 0
    for picture in prompt.pictures:
        runs += ["text"] if picture.first_token > place else []
        runs.append("frame" if picture.is_frame else "image")
        place = picture.end_token
    return runs + (["text"] if prompt.num_tokens > place else [])


def _steps(prompt: Prompt, number: int) -> torch.Tensor:
    """[3, tokens of a picture]: positions from its first token on."""
    picture = prompt.pictures[number]
    positions = prompt.model_input.position_ids[:, picture.first_token : picture.end_token]
    return positions - positions[:, :1]


def is_own_prompt(prompt: Prompt, rollout: Rollout) -> bool:
    """Whether a rollout was sampled behind this prompt."""
    return np.array_equal(prompt.model_input.input_ids.numpy(), rollout.prompt_ids)


def check_lengths(scored: Scored, rollout: Rollout, num_chosen: int) -> None:
    """A score is of every token of the response, each by what stands before it: one row a token, none of the prompt."""
    num_tokens = len(rollout.output_ids)
    assert scored.logprobs.shape == (num_tokens,), f"{rollout.id}: {scored.logprobs.shape} scores for {num_tokens} tokens"
    assert scored.chosen.shape == (num_tokens, num_chosen), f"{rollout.id}: chosen {scored.chosen.shape}"
    assert scored.top_ids.shape == scored.top_logprobs.shape and len(scored.top_ids) == num_tokens, f"{rollout.id}: top k"
    # The likeliest token is never less likely than the one that was said.
    if scored.top_ids.shape[1]:
        is_shifted = bool((scored.logprobs > scored.top_logprobs[:, 0] + 1e-3).any())
        assert not is_shifted, f"{rollout.id}: scores and likeliest tokens are of different places"


def is_finite(scored: Scored) -> bool:
    """Whether every number can be learnt from."""
    return all(bool(np.isfinite(part).all()) for part in (scored.logprobs, scored.chosen, scored.top_logprobs))
