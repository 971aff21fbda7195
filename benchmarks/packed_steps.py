"""Times a training pass, forward and backward, over typical packs, beside the same decoder on torch's own attention.

    python -m benchmarks.packed_steps [--steps 5] [--only tiny-long tiny-short text]

Two decoders with random weights in bfloat16: the six layers of openkeye-tiny (8 query and 2 KV heads of 32, 192 keys of a
selection) over packs of clips with their questions as branches, and 30 layers shaped like SmolLM2-135M (9 and 3 heads of 64,
256 keys) over a document of 8,192 tokens. The peer is `torch.nn.functional.scaled_dot_product_attention`, called for every
trunk and for the branches of every document; the ratio is the pass's time over the peer's. On a CPU a tiny shape runs in
float32, which shows that all of it works and times nothing worth telling.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.data.packed_batch import DocumentSpan, PackedLayout
from openkeye.kernels.visible_keys import VisibleKeys
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.past import IndexerOutput, Past
from openkeye.train.initialise import initialise
from openkeye.train.packed_past import PackedPast, Teaching

MODES = {
    "dense": ("dense", None),
    "dense, KL": ("dense", "dense"),
    "sparse, KL on the selection": ("sparse", "selected"),
    "sparse, KL on the dense one cut": ("sparse", "selected_dense"),
}


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    hidden: int
    layers: int
    heads: int
    groups: int
    width: int
    experts: int
    picked: int
    expert_width: int
    index_heads: int
    index_width: int
    top_k: int

    def config(self) -> KeyeConfig:
        half = self.width // 2
        sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        return KeyeConfig.from_dict(
            {
                "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.groups, "head_dim": self.width, "num_experts": self.experts,
                "num_experts_per_tok": self.picked, "moe_intermediate_size": self.expert_width, "norm_topk_prob": True,
                "vocab_size": 672, "tie_word_embeddings": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
                "attention_bias": False, "rope_scaling": {"rope_type": "default", "mrope_section": sections},
                "sa_config": {
                    "indexer_num_heads": self.index_heads, "indexer_head_dim": self.index_width, "topk": self.top_k,
                },
                "image_token_id": 5, "video_token_id": 6,
            }
        )  # fmt: skip


TINY = Shape(256, 6, 8, 2, 32, 8, 4, 96, 4, 32, 192)
TEXT = Shape(576, 30, 9, 3, 64, 1, 1, 1536, 8, 64, 256)
SMALLEST = Shape(64, 2, 4, 2, 16, 2, 1, 32, 4, 16, 8)
PACKS: dict[str, tuple[Shape, list[tuple[int, int]]]] = {
    "tiny-long": (TINY, [(13_200, 32)] * 3),
    "tiny-short": (TINY, [(1_000, 8)] * 35),
    "text": (TEXT, [(8_192, 0)]),
}
# (tokens of a trunk, number of branches) of each document
SMALL_PACKS = {"smallest": (SMALLEST, [(40, 3), (17, 0), (9, 1)])}
BRANCH_TOKENS = 50


@dataclass
class PeerPast(Past):
    """Dense attention by torch alone, document by document."""

    visible: VisibleKeys

    @property
    def needs_index(self) -> bool:
        return False

    def attend(
        self, layer_index: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, index: IndexerOutput | None
    ) -> Tensor:
        outputs = []
        for span in self.visible.spans:
            trunk = slice(span.start, span.trunk_end)
            outputs.append(_attend(query_THD[trunk], key_TGD[trunk], value_TGD[trunk], None))
            if span.branches:
                rows, keys = slice(span.trunk_end, span.end), slice(span.start, span.end)
                numbers = torch.arange(span.start, span.end, device=query_THD.device)
                mask = self.visible.mask(numbers[span.trunk_end - span.start :], numbers)
                outputs.append(_attend(query_THD[rows], key_TGD[keys], value_TGD[keys], mask))
        return torch.cat(outputs)


def _attend(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_SGD, value_SGD))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return output[0].transpose(0, 1)


def make_layout(documents: list[tuple[int, int]], branch_tokens: int) -> PackedLayout:
    spans, start = [], 0
    for trunk, branches in documents:
        begins = tuple(start + trunk + number * branch_tokens for number in range(branches))
        end = start + trunk + branches * branch_tokens
        spans.append(DocumentSpan(start, start + trunk, begins, end))
        start = end
    return PackedLayout(tuple(spans))


def median_ms(work: Callable[[], object], device: str, steps: int) -> float:
    times = []
    for _ in range(steps):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def time_pack(name: str, shape: Shape, documents: list[tuple[int, int]], device: str, steps: int) -> None:
    """One row for the peer and for every mode."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layout = make_layout(documents, BRANCH_TOKENS if device == "cuda" else 5)
    model = KeyeModel(shape.config())
    initialise(model, 0)
    model.to(device, dtype)
    num_tokens = layout.num_tokens
    embeds = torch.randn(num_tokens, shape.hidden, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    positions = torch.arange(num_tokens, device=device).expand(3, -1)
    weights = torch.full((num_tokens,), 1 / num_tokens, device=device)
    visible = VisibleKeys.of(layout.spans, torch.device(device))

    def run(make_past: Callable[[], Past]) -> None:
        model.zero_grad(set_to_none=True)
        past = make_past()
        loss = model(embeds, positions, past).float().square().mean()
        if isinstance(past, PackedPast) and past.teaching is not None:
            loss = loss + past.indexer_loss
        loss.backward()

    def row(label: str, make_past: Callable[[], Past], peer_ms: float | None) -> float:
        for _ in range(2):
            run(make_past)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        milliseconds = median_ms(lambda: run(make_past), device, steps)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        ratio = 1.0 if peer_ms is None else milliseconds / peer_ms
        rate = num_tokens / milliseconds
        print(f"| {name} | {num_tokens:,} | {label} | {milliseconds:.1f} | {ratio:.2f} | {rate:.0f} | {peak:.1f} |", flush=True)
        return milliseconds

    peer_ms = row("dense, torch's attention", lambda: PeerPast(visible), None)
    for label, (attention, target) in MODES.items():
        teaching = None if target is None else Teaching(target, weights)
        row(label, lambda a=attention, t=teaching: PackedPast(layout, shape.top_k, a, t), peer_ms)  # type: ignore[misc]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packs = PACKS if device == "cuda" else SMALL_PACKS
    parser = argparse.ArgumentParser(description="Time training passes over packs.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=packs, default=list(packs))
    arguments = parser.parse_args()
    print("| pack | tokens | attention | ms | over the peer | tokens a ms | peak GiB |\n|---|---|---|---|---|---|---|")
    for name in arguments.only:
        time_pack(name, *packs[name], device, arguments.steps)


if __name__ == "__main__":
    main()
