"""Runs the network on a batch: embeds text and pictures, walks the layers over the pages, returns the next token's logits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from openkeye.common.device import upload
from openkeye.engine.batch import Batch, PagedPast, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.graphs import DecodeGraphs, StepRow, can_capture
from openkeye.engine.pages import PagedCaches
from openkeye.engine.request import Request
from openkeye.engine.route_cache import RouteCache
from openkeye.engine.vision_cache import VisionCache
from openkeye.inputs.patches import Patches, join_patches, patches_from_pixels
from openkeye.inputs.prompt import Picture
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import local_config

VISION_SLICE_TOKENS = 4096
# of the pictures that the vision tower takes at once, where they are more than one


class Runner:
    """The network with its caches."""

    def __init__(self, model: KeyeModel, config: EngineConfig, attention: str) -> None:
        self.model = model
        self.config = config
        self.attention = attention
        model.join_projections()
        for part in model.modules():
            if isinstance(part, MixtureOfExperts):
                part.has_fixed_blocks = config.is_batch_invariant
        embeddings = model.model.embed_tokens.weight
        self.device, self.dtype = embeddings.device, embeddings.dtype
        local = local_config(model.config, model.shard.size)
        self.caches = PagedCaches(local, config, self.device, self.dtype, has_index=attention == "sparse")
        self.routes = RouteCache(model, self.caches.num_slots) if config.records_routes else None
        self.graphs: DecodeGraphs | None = None
        is_captured = model.shard.size == 1 if config.has_graphs is None else config.has_graphs
        if is_captured and can_capture(model, self.caches, attention):
            assert config.cache_tokens is not None
            longest = min(config.cache_tokens, model.config.max_position_embeddings)
            shape = (config.max_batch_requests, longest, config.is_batch_invariant)
            self.graphs = DecodeGraphs(model, self.caches, attention, *shape, self.routes)
        self._num_runs = 0
        self.keeps_picks = False
        # in the batch under way
        self.dense_up_to = config.dense_up_to
        if config.is_batch_invariant and self.dense_up_to is None:
            # Back ends of dense attention are chosen by the shape; lists of all keys take one way whatever it is.
            self.dense_up_to = 0
        self.vision_cache = VisionCache(config.vision_cache_bytes)
        self.vision_salt = ""
        # names the weights of tower and projector: what others encoded is never found under it
        # A picture's bits must not depend on which others are missing.
        self._slice_pictures = 1 if config.is_batch_invariant else config.vision_slice_pictures
        self.original_experts: dict[str, Tensor] = {}
        # on the host, of experts that the model holds in e4m3: what deltas are told against (`weight_update`)
        self.vision_seconds = 0.0
        # spent in the vision tower since the engine last asked

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the last new token of every segment, [segments, V]; keys and values are in the pages afterwards."""
        every = self.config.records_picks_every
        self.keeps_picks = every is not None and self._num_runs % every == 0
        self._num_runs += 1
        with self._row_exact():
            return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        if self.graphs is not None and self._can_replay(batch):
            return self.replay([self._step_row(segment) for segment in batch.segments])
        hidden = self.run_hidden(batch)
        if batch.num_padded and not batch.is_prompt:
            # A product of another shape may round otherwise.
            return self.logits(hidden, torch.arange(hidden.shape[0]))[: len(batch.segments)]
        last = torch.tensor([segment.count for segment in batch.segments]).cumsum(0) - 1
        return self.logits(hidden, last)

    @torch.inference_mode()
    def run_hidden(self, batch: Batch) -> Tensor:
        """What `logits` takes, of every new token, [T, hidden]."""
        embeds = torch.cat([self._embed(segment) for segment in batch.segments])
        positions = torch.cat([self._positions(segment) for segment in batch.segments], dim=1)
        if batch.num_padded:
            embeds, positions = pad(embeds, (0, 0, 0, batch.num_padded)), pad(positions, (0, batch.num_padded))
        return self.walk(batch, embeds, positions)

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows_N: Tensor) -> Tensor:
        """[N, V] of some rows (int64, on the host) of what `run_hidden` returned last."""
        return self.model.logits(hidden_TD[upload(rows_N, self.device)])

    def replay(self, rows: list[StepRow]) -> Tensor:
        """[B, V] of a step of answers under way, from a captured graph."""
        assert self.graphs is not None
        return self.graphs.run(rows)

    def walk(self, batch: Batch, embeds_TD: Tensor, position_ids_3T: Tensor) -> Tensor:
        """The decoder's hidden states of a batch, [T, hidden]; positions come on the host."""
        past = self.past_of(batch)
        hidden_TD = self.model(embeds_TD, position_ids_3T.to(self.device), past)
        if self.routes is not None:
            self.routes.write(past.new_slots_T)
        return hidden_TD

    def past_of(self, batch: Batch) -> PagedPast:
        """The past that a batch sees."""
        top_k = self.model.config.indexer.top_k
        keeps = (batch.keeps_evidence, self.keeps_picks)
        return PagedPast(batch, self.caches, self.attention, top_k, self.dense_up_to, *keeps)

    def encode(self, patches: Patches) -> Tensor:
        """`KeyeModel.encode_patches` of pixels that lie on the device."""
        return self.model.encode_patches(patches)

    @contextmanager
    def _row_exact(self) -> Iterator[None]:
        """On a CPU one thread: several cut a product, and a row rounds by where it stands among the cuts."""
        if not self.config.is_batch_invariant or self.device.type != "cpu":
            yield
            return
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    def _can_replay(self, batch: Batch) -> bool:
        """Whether a captured graph of decoding computes this batch: answers under way alone, none of them widened."""
        widened = range(self.model.config.indexer.top_k, self.dense_up_to or 0) if self.attention == "sparse" else ()
        return (
            all(
                segment.start >= segment.request.num_prompt and segment.count == 1 and segment.start not in widened
                for segment in batch.segments
            )
            and not batch.keeps_evidence
            and not self.keeps_picks
        )

    def _step_row(self, segment: Segment) -> StepRow:
        request, page_size = segment.request, self.config.page_size
        slot = request.pages[segment.start // page_size] * page_size + segment.start % page_size
        position = segment.start + request.prompt.model_input.rope_delta
        return StepRow(request, request.output_ids[segment.start - request.num_prompt], position, slot, segment.end)

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
        hashes = [f"{self.vision_salt}{request.media.hashes[picture.number]}" for picture in pictures]
        known = {content_hash: self.vision_cache.get(content_hash) for content_hash in hashes}
        named = zip(hashes, pictures, strict=True)
        missing = list({content_hash: picture for content_hash, picture in named if known[content_hash] is None}.items())
        start = time.monotonic()
        for part in self._slices(missing):
            encoded = self.encode(self._patches(request, [picture for _, picture in part]))
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
            while end < min(first + self._slice_pictures, len(missing)):
                num_tokens += missing[end][1].num_tokens
                if num_tokens > VISION_SLICE_TOKENS:
                    break
                end += 1
            yield missing[first:end]
            first = end

    def _patches(self, request: Request, pictures: list[Picture]) -> Patches:
        vision = self.model.config.vision
        assert vision is not None
        pixels = [request.media.pixels(picture.number) for picture in pictures]
        # As bytes, a quarter of the patches' size, they go to the device; those of one size that follow one another together.
        runs = [np.stack(list(run)) for _, run in groupby(pixels, key=lambda picture: picture.shape)]
        patches = join_patches([patches_from_pixels(torch.from_numpy(run).to(self.device), vision.patch_size) for run in runs])
        assert patches is not None
        return Patches(patches.pixels.to(self.dtype), patches.grid_thw)
