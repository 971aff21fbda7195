"""From rollouts to documents for learning: the ids that the engine saw, at its positions, with the same pixels.

Letters: L tokens of a document, P prompt tokens, T output tokens of a rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openkeye.data.convert import pixels_of
from openkeye.data.document import Document, Pictures, PixelPictures
from openkeye.inputs.patches import Patches, join_patches, patches_from_pixels
from openkeye.inputs.prompt import Prompt
from openkeye.rl.rollout import Rollout
from openkeye.tasks.drawn_frames import DrawnFrames


def rollout_document(prompt: Prompt, rollout: Rollout, patch_size: int = 14) -> Document:
    """One rollout alone: token t of its output is token P + t of the document. Learnt is what the policy sampled.

    Raises:
        ValueError: a prompt other than the rollout's.
    """
    _check(prompt, rollout)
    output_T = _output(rollout)
    return Document(
        name=str(rollout.id),
        input_ids=torch.cat([prompt.model_input.input_ids, output_T]),
        position_ids=torch.cat([prompt.model_input.position_ids, _positions(prompt, prompt.num_tokens, len(output_T))], dim=1),
        is_learnt=torch.cat([torch.zeros(prompt.num_tokens, dtype=torch.bool), torch.from_numpy(rollout.is_policy.copy())]),
        is_media=_is_media(prompt, len(output_T)),
        pictures=_pictures(prompt, patch_size),
        task=rollout.id.task,
    )


def group_document(prompt: Prompt, rollouts: Sequence[Rollout], patch_size: int = 14) -> Document:
    """A group's rollouts behind one prompt, which is computed once: a branch for each.

    A branch begins with the prompt's last token, which predicts the first of its output: token t of member m's output is
    token `branches[m] + 1 + t` of the document. Members without any output are refused.

    Raises:
        ValueError: a prompt other than the rollouts', or one whose last token is a picture's.
    """
    assert rollouts, "a group has members"
    trunk = prompt.num_tokens - 1
    is_media = _is_media(prompt, 0)
    if trunk < 1 or bool(is_media[-1]):
        raise ValueError(f"{rollouts[0].id}: a prompt of a group has two tokens at least, and ends with text")
    ids, positions = [prompt.model_input.input_ids[:trunk]], [prompt.model_input.position_ids[:, :trunk]]
    learnt, starts = [torch.zeros(trunk, dtype=torch.bool)], []
    for rollout in rollouts:
        _check(prompt, rollout)
        starts.append(sum(len(part) for part in ids))
        output_T = _output(rollout)
        ids += [prompt.model_input.input_ids[trunk:], output_T]
        last = prompt.model_input.position_ids[:, trunk:]
        positions += [last, _positions(prompt, prompt.num_tokens, len(output_T))]
        learnt += [torch.zeros(1, dtype=torch.bool), torch.from_numpy(rollout.is_policy.copy())]
    input_ids = torch.cat(ids)
    behind = torch.zeros(len(input_ids) - trunk, dtype=torch.bool)
    return Document(
        name=str(rollouts[0].id),
        input_ids=input_ids,
        position_ids=torch.cat(positions, dim=1),
        is_learnt=torch.cat(learnt),
        is_media=torch.cat([is_media[:trunk], behind]),
        pictures=_pictures(prompt, patch_size),
        branches=tuple(starts),
        task=rollouts[0].id.task,
    )


def _check(prompt: Prompt, rollout: Rollout) -> None:
    if not np.array_equal(prompt.model_input.input_ids.numpy(), rollout.prompt_ids):
        raise ValueError(f"{rollout.id}: its prompt has other ids than the one given; lay the same messages out")
    if not len(rollout.output_ids):
        raise ValueError(f"{rollout.id}: a rollout without output; there is nothing to learn")


def _output(rollout: Rollout) -> Tensor:
    return torch.from_numpy(rollout.output_ids.astype(np.int64))


def _positions(prompt: Prompt, first: int, count: int) -> Tensor:
    """[3, count] from a token's index on: behind the prompt all axes go on by one."""
    return (torch.arange(first, first + count) + prompt.model_input.rope_delta).expand(3, -1)


def _is_media(prompt: Prompt, num_behind: int) -> Tensor:
    mask = torch.zeros(prompt.num_tokens + num_behind, dtype=torch.bool)
    for picture in prompt.pictures:
        mask[picture.first_token : picture.end_token] = True
    return mask


@dataclass(frozen=True)
class DrawnClip:
    """`Pictures` of a clip that is drawn on a GPU: there they stay, where the learner computes there too."""

    frames: DrawnFrames
    patch_size: int

    @property
    def num_pictures(self) -> int:
        return len(self.frames.times_seconds)

    def patches(self, device: torch.device | str) -> Patches:
        """See `Pictures.patches`."""
        if torch.device(device).type != torch.device(self.frames.device).type:
            # Another device may round otherwise, and the engine saw these.
            return PixelPictures([self.frames.pixels], self.patch_size).patches(device)
        patches = join_patches([patches_from_pixels(part, self.patch_size) for part in self.frames.parts(device)])
        assert patches is not None, "a clip has frames"
        return patches


def _pictures(prompt: Prompt, patch_size: int) -> tuple[Pictures, ...]:
    return tuple(
        DrawnClip(item, patch_size)
        if isinstance(item, DrawnFrames) and torch.device(item.device).type != "cpu"
        else PixelPictures([pixels_of(item)], patch_size)
        for item in prompt.media
    )
