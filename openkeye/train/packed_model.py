"""`PackedModel`: the network over packs, for modules whose forward makes all of its calls: losses and policies build on it.

Sharded parameters are whole only inside the forward of the module that owns them, so embeddings, head, vision tower and
projector are used inside that one's.

Letters: T tokens, D width, M media tokens, L layers, K experts of a token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openkeye.data.packed_batch import PackedBatch
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.keye import KeyeModel
from openkeye.train.shard import decoder_layers


class PackedModel(nn.Module):
    """A `KeyeModel` for packs, with activations that may be computed again and routes that may be replayed."""

    def __init__(self, keye: KeyeModel) -> None:
        super().__init__()
        self.keye = keye
        self.recomputes = False
        # activations of decoder layers are made again in the backward pass
        self.routes: list[Tensor] | None = None
        # of the pass that begins next: [T, K] of each layer, see `MixtureOfExperts.replayed_TK`
        for number, layer in enumerate(decoder_layers(keye)):
            layer.forward = partial(self._run_layer, number, layer.mlp, layer.forward)  # type: ignore[method-assign]

    def recompute(self, is_wanted: bool, trains: Sequence[str]) -> None:
        """Let layers compute their activations again, where something in or below the decoder trains.

        Where nothing does, they keep no activations, and have no gradients by which the ranks would know when to gather their
        parameters again.
        """
        self.recomputes = is_wanted and any(part != "indexer" for part in trains)

    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures of experts; a layer may have none."""
        return [layer.mlp for layer in decoder_layers(self.keye) if isinstance(layer.mlp, MixtureOfExperts)]

    def _run_layer(self, number: int, mlp: nn.Module, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
        replayed_TK = None if self.routes is None else self.routes[number]

        def run(*arguments: Any) -> Tensor:
            # Bound here, so that a layer computed again goes the way of its own pass, whichever began since.
            if isinstance(mlp, MixtureOfExperts):
                mlp.replayed_TK = replayed_TK
            return forward(*arguments)

        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(run, *arguments, use_reentrant=False)
        return run(*arguments)

    def encode_pictures(self, batch: PackedBatch) -> Tensor | None:
        """[M, D]: the vectors of all pictures of a pack; of no rows where it has none, None where the network sees none."""
        keye = self.keye
        if keye.config.vision is None:
            return None
        patches = batch.patches()
        if patches is not None:
            return keye.encode_patches(patches)
        # Over no rows, so that this rank has gradients (zeros) for the parameters of which others have some to add.
        size, channels = keye.config.vision.patch_size, keye.config.vision.num_channels
        side = keye.config.vision.spatial_merge_size
        pixels = torch.zeros(0, side * side, channels, size, size, device=batch.device)
        return keye.mlp_AR(keye.visual.vision_model(pixels, side, side), side, side)

    def embed(self, batch: PackedBatch, vectors_MD: Tensor | None) -> Tensor:
        """[T, D] with the pictures' vectors (`encode_pictures`) in their places."""
        if vectors_MD is None:
            return self.keye.model.embed_tokens(batch.input_ids)
        return self.keye.embed_at(batch.input_ids, batch.media_positions, vectors_MD)

    def head_weight(self, hidden_TD: Tensor) -> Tensor:
        """[V, D] in the hidden states' dtype."""
        keye = self.keye
        weight = keye.model.embed_tokens.weight if keye.config.tie_word_embeddings else keye.lm_head.weight
        return weight.to(hidden_TD.dtype)
