"""The whole network; parameter names are the published ones, so that the state dict is the checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from openkeye.common.checks import InputError
from openkeye.inputs.patches import Patches
from openkeye.model.attention import Attention
from openkeye.model.config import KeyeConfig
from openkeye.model.decoder import Decoder
from openkeye.model.past import CachedPast, Past
from openkeye.model.projector import Projector
from openkeye.model.sharding import ALONE
from openkeye.model.vision import VisionTower, same_size_runs


class KeyeModel(nn.Module):
    """Vision tower, projector, decoder and head."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.shard = ALONE
        # of which the parameters are (`sharding.shard_model`); the configuration is that of the whole
        self.kept_tensors: tuple[Any, ...] = ()
        # tensors of the checkpoint's files that no computation uses (`weights.KeptTensor`)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.vision is not None:
            self.visual = VisionTower(config.vision)
            self.mlp_AR = Projector(config)

    def encode_patches(self, patches: Patches) -> Tensor:
        """Pictures or frames to decoder-width vectors, [merged tokens, hidden], in order.

        Pictures never attend to one another, so any split of them over calls gives the same vectors.
        """
        assert self.config.vision is not None, "a text-only configuration has no vision tower"
        outputs = []
        start = 0
        for first, end, height, width in same_size_runs(patches):
            size = (end - first) * height * width
            pixels = patches.pixels[start : start + size].unflatten(0, (end - first, height * width))
            outputs.append(self.mlp_AR(self.visual.vision_model(pixels, height, width), height, width))
            start += size
        return torch.cat(outputs)

    def embed(self, input_ids_T: Tensor, image_embeds: Tensor | None, video_embeds: Tensor | None) -> Tensor:
        """Token embeddings with the rows of image and video pads overwritten, in order, [T, hidden].

        Raises:
            InputError: the number of pads differs from the number of vectors.
        """
        embeds = self.model.embed_tokens(input_ids_T)
        for token_id, vectors in ((self.config.image_token_id, image_embeds), (self.config.video_token_id, video_embeds)):
            if vectors is None:
                continue
            is_pad = input_ids_T == token_id
            if not is_pad.is_cuda and int(is_pad.sum()) != vectors.shape[0]:
                raise InputError(
                    f"the prompt holds {int(is_pad.sum())} pads of token {token_id} for {vectors.shape[0]} vectors"
                )
            # Sorting finds the pads in order without asking the device how many there are, backward included.
            pads = (~is_pad).byte().argsort(stable=True)[: vectors.shape[0]]
            embeds = embeds.index_copy(0, pads, vectors.to(embeds.dtype))
        return embeds

    def embed_at(self, input_ids_T: Tensor, media_positions_M: Tensor, vectors_MD: Tensor) -> Tensor:
        """Token embeddings with the rows at these places overwritten, [T, hidden]; no token is taken for a pad by its id."""
        embeds = self.model.embed_tokens(input_ids_T)
        return embeds.index_copy(0, media_positions_M, vectors_MD.to(embeds.dtype))

    def forward(self, embeds_TD: Tensor, position_ids_3T: Tensor, past: Past | CachedPast) -> Tensor:
        """Run the decoder on new tokens: [T, hidden] -> normalised hidden states [T, hidden]."""
        return self.model(embeds_TD, position_ids_3T, past)

    def join_projections(self) -> None:
        """See `Attention.join_projections`; for answering, after the weights are loaded."""
        for part in self.modules():
            if isinstance(part, Attention):
                part.join_projections()

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocabulary]."""
        if self.config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight[self.shard.part(self.config.vocab_size)]
        else:
            weight = self.lm_head.weight
        return self.shard.gather_columns(nn.functional.linear(hidden_TD, weight))
