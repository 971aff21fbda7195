"""What a model says of a response that is already there: the record, who makes it, and the plain way to make it.

Letters: T tokens of the response, P of the prompt, K chosen tokens, k likeliest tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openkeye.data.document import Document, PixelPictures
from openkeye.data.packed_batch import pack
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import Frames
from openkeye.model.keye import KeyeModel
from openkeye.train.packed_past import PackedPast

SLAB_ROWS = 256
# tokens whose logits stand in memory at once: a row is as wide as the vocabulary


@dataclass(frozen=True)
class Scored:
    """Natural logarithms of probabilities at temperature 1."""

    logprobs: np.ndarray
    # [T] float32, of the response's own tokens
    chosen: np.ndarray
    # [T, K] float32, of the chosen tokens; 0 where their id is negative
    top_ids: np.ndarray
    # [T, k] int32, the likeliest first
    top_logprobs: np.ndarray
    # [T, k] float32

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.logprobs, self.chosen, self.top_ids, self.top_logprobs))


class ResponseScorer(Protocol):
    """A model that reads a response."""

    def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """One pass over prompt and response, in which logits never stand for all tokens at once.

        Args:
            prompt: as this model's own processor writes it.
            output_ids: [T] the response.
            chosen_ids: [T, K] tokens asked for at each place, negative where unused; None for none.
            top_k: how many of its likeliest tokens to tell.
        """
        ...


class ModelScorer:
    """`ResponseScorer` of a network in this process: the definition that faster ones are held against."""

    def __init__(self, model: KeyeModel, attention: str = "sparse", slab_rows: int = SLAB_ROWS) -> None:
        self.model = model
        self._attention, self._slab_rows = attention, slab_rows

    @torch.no_grad()
    def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `ResponseScorer.score`."""
        if not len(output_ids):
            raise ValueError("a response without tokens has no score")
        hidden_TD = response_hidden(self.model, prompt_document(prompt, output_ids), prompt.num_tokens, self._attention)
        num_tokens = len(output_ids)
        ids_TK = np.zeros((num_tokens, 0), np.int64) if chosen_ids is None else np.asarray(chosen_ids, np.int64)
        asked = np.concatenate([np.asarray(output_ids, np.int64)[:, None], ids_TK], axis=1)
        values, top_ids, top_values = [], [], []
        for rows in torch.arange(num_tokens).split(self._slab_rows):
            slab = slice(int(rows[0]), int(rows[-1]) + 1)
            logits_nV = self.model.logits(hidden_TD[slab]).float()
            lse_n1 = logits_nV.logsumexp(dim=-1, keepdim=True)
            ids = torch.from_numpy(asked[slab]).to(logits_nV.device)
            values.append((logits_nV.gather(1, ids.clamp(min=0)) - lse_n1).masked_fill(ids < 0, 0.0))
            top = logits_nV.topk(min(top_k, logits_nV.shape[1]), dim=-1)
            top_ids.append(top.indices)
            top_values.append(top.values - lse_n1)
        found, top_found, ids_found = (torch.cat(parts).cpu().numpy() for parts in (values, top_values, top_ids))
        return Scored(found[:, 0], found[:, 1:], ids_found.astype(np.int32), top_found)


def response_hidden(model: KeyeModel, document: Document, num_prompt: int, attention: str = "sparse") -> Tensor:
    """[T, D]: last hidden states that predict the tokens behind a prompt: shifted by one, from the prompt's last token on."""
    device = model.model.norm.weight.device
    batch = pack([document]).to(device)
    patches = batch.patches()
    if patches is None:
        embeds_TD = model.model.embed_tokens(batch.input_ids)
    else:
        embeds_TD = model.embed_at(batch.input_ids, batch.media_positions, model.encode_patches(patches))
    past = PackedPast(batch.layout, model.config.indexer.top_k, attention)
    hidden_TD = model(embeds_TD, batch.position_ids, past)
    return hidden_TD[num_prompt - 1 : document.num_tokens - 1]


def prompt_document(prompt: Prompt, output_ids: Sequence[int] | np.ndarray, name: str = "response") -> Document:
    """Prompt and response as the network reads them: the response's positions go on from the prompt's.

    Raises:
        ValueError: a video of the prompt is not decoded.
    """
    own = prompt.model_input
    behind = torch.as_tensor(np.asarray(output_ids, np.int64))
    positions = (own.num_tokens + own.rope_delta + torch.arange(len(behind))).expand(3, -1)
    is_media = torch.zeros(own.num_tokens + len(behind), dtype=torch.bool)
    for picture in prompt.pictures:
        is_media[picture.first_token : picture.end_token] = True
    pixels = []
    for medium in prompt.media:
        if not isinstance(medium, (np.ndarray, Frames)):
            raise ValueError(f"{medium.source} is not decoded; give its frames")
        pixels.append(medium.pixels if isinstance(medium, Frames) else medium[None])
    return Document(
        name,
        torch.cat([own.input_ids, behind]),
        torch.cat([own.position_ids, positions], dim=1),
        torch.arange(len(is_media)) >= own.num_tokens,
        is_media,
        (PixelPictures(pixels),) if pixels else (),
    )
