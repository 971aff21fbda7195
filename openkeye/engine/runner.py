"""Runs the network on a batch: embeds text and pictures, walks the layers over the pages, returns the next token's logits."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from openkeye.engine.batch import Batch, PagedPast, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.pages import PagedCaches
from openkeye.engine.request import Request
from openkeye.engine.vision_cache import VisionCache
from openkeye.inputs.patches import Patches, join_patches, patches_from_pixels
from openkeye.inputs.prompt import Picture
from openkeye.model.keye import KeyeModel

VISION_SLICE_TOKENS = 4096
# of the pictures that the vision tower takes at once, where they are more than one


class Runner:
    """The network with its caches."""

    def __init__(self, model: KeyeModel, config: EngineConfig, attention: str) -> None:
        self.model = model
        self.config = config
        self.attention = attention
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.caches = PagedCaches(model.config, config, self.device, self.dtype)
        self.vision_cache = VisionCache(config.vision_cache_bytes)
        self.vision_seconds = 0.0
        # spent in the vision tower since the engine last asked

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the last new token of every segment, [segments, V]; keys and values are in the pages afterwards."""
        hidden = self.run_hidden(batch)
        last = torch.tensor([segment.count for segment in batch.segments]).cumsum(0) - 1
        return self.model.logits(hidden[last.to(self.device)])

    @torch.inference_mode()
    def run_hidden(self, batch: Batch) -> Tensor:
        """What `KeyeModel.logits` takes, of every new token, [T, hidden]."""
        embeds = torch.cat([self._embed(segment) for segment in batch.segments])
        positions = torch.cat([self._positions(segment) for segment in batch.segments], dim=1)
        top_k = self.model.config.indexer.top_k
        past = PagedPast(batch, self.caches, self.attention, top_k, self.config.dense_up_to)
        return self.model(embeds, positions.to(self.device), past)

    def _positions(self, segment: Segment) -> Tensor:
        """[3, count]: the prompt's own, then index + delta on all axes."""
        request = segment.request
        model_input = request.prompt.model_input
        end = segment.start + segment.count
        given = model_input.position_ids[:, segment.start : min(end, request.num_prompt)]
        later = torch.arange(max(segment.start, request.num_prompt), max(end, request.num_prompt)) + model_input.rope_delta
        return torch.cat([given, later.expand(3, -1)], dim=1)

    def _embed(self, segment: Segment) -> Tensor:
        """[count, hidden]: tokens and pictures of the prompt, then tokens of the answer."""
        request, end = segment.request, segment.start + segment.count
        parts = []
        if segment.start < request.num_prompt:
            parts.append(self._embed_prompt(request, segment.start, min(end, request.num_prompt)))
        if end > request.num_prompt:
            # Apart from the prompt: a pad that a model happens to write is no picture's place.
            ids = request.output_ids[max(segment.start - request.num_prompt, 0) : end - request.num_prompt]
            parts.append(self.model.embed(torch.tensor(ids).to(self.device), None, None))
        return torch.cat(parts)

    def _embed_prompt(self, request: Request, start: int, end: int) -> Tensor:
        ids = request.input_ids[start:end].to(self.device)
        inside = [p for p in request.pictures if p.first_token < end and p.first_token + p.num_tokens > start]
        features = self._features(request, inside)
        rows: dict[bool, list[Tensor]] = {False: [], True: []}
        for picture, feature in zip(inside, features, strict=True):
            rows[picture.is_frame].append(feature[max(0, start - picture.first_token) : end - picture.first_token])
        images, frames = (torch.cat(rows[kind]) if rows[kind] else None for kind in (False, True))
        return self.model.embed(ids, images, frames)

    def _features(self, request: Request, pictures: list[Picture]) -> list[Tensor]:
        """Encoded pictures, from the cache or encoded now in slices: no more than a slice's patches are in memory."""
        hashes = [request.media.hashes[picture.number] or "" for picture in pictures]
        known = {content_hash: self.vision_cache.get(content_hash) for content_hash in hashes}
        named = zip(hashes, pictures, strict=True)
        missing = list({content_hash: picture for content_hash, picture in named if known[content_hash] is None}.items())
        start = time.monotonic()
        for part in self._slices(missing):
            encoded = self.model.encode_patches(self._patches(request, [picture for _, picture in part]))
            sizes = [picture.num_tokens for _, picture in part]
            for (content_hash, _), feature in zip(part, encoded.split(sizes), strict=True):
                known[content_hash] = feature
                self.vision_cache.put(content_hash, feature)
        self.vision_seconds += time.monotonic() - start
        features = [known[content_hash] for content_hash in hashes]
        return [feature for feature in features if feature is not None]

    def _slices(self, missing: list[tuple[str, Picture]]) -> Iterator[list[tuple[str, Picture]]]:
        """What the vision tower takes at once: a few pictures, fewer where they are large."""
        first = 0
        while first < len(missing):
            end, num_tokens = first + 1, missing[first][1].num_tokens
            while end < min(first + self.config.vision_slice_pictures, len(missing)):
                num_tokens += missing[end][1].num_tokens
                if num_tokens > VISION_SLICE_TOKENS:
                    break
                end += 1
            yield missing[first:end]
            first = end

    def _patches(self, request: Request, pictures: list[Picture]) -> Patches:
        vision = self.model.config.vision
        assert vision is not None
        # As bytes, a quarter of the patches' size, they go to the device.
        pixels = [torch.from_numpy(request.media.pixels(picture.number)).to(self.device) for picture in pictures]
        patches = join_patches([patches_from_pixels(picture[None], vision.patch_size) for picture in pixels])
        assert patches is not None
        return Patches(patches.pixels.to(self.dtype), patches.grid_thw)
