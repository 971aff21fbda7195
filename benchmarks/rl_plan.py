"""What a step of reinforcement learning at size needs: operations and bytes of each phase, and the memory of both sides.

Letters in comments: N parameters, R those outside of the layers (embeddings and head), L those of one layer.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from openkeye.common.checks import InputError
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.train.shard import GATHERED_PARAMETERS

GB = 1e9
CONTEXT_BYTES = 3 * 10**9
# of two libraries' workspaces, captured graphs and what the allocator cannot use
SELECTION_BYTES = 4
# of one place in a list of selected keys


@dataclass(frozen=True)
class Machine:
    """What a GPU reaches."""

    matrix_tflops: float = 800.0
    # measured, in bf16
    peak_tflops: float = 989.0
    # the maker's figure, of which shares are told
    memory_tbps: float = 3.0

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The longer of both, since they overlap."""
        return max(flops / self.matrix_tflops, num_bytes / self.memory_tbps) / 1e12


@dataclass(frozen=True)
class Work:
    """What a phase must do at least."""

    flops: float
    num_bytes: float
    # read and written in the device's memory


@dataclass(frozen=True)
class StepShape:
    """A model and a batch of rollouts."""

    config: KeyeConfig
    num_groups: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_pack: int
    chunk_tokens: int
    # of a prompt in one batch of the engine
    top_k: int
    # likeliest tokens that the scorer returns
    page_size: int = 64
    element_bytes: int = 2
    # of weights as passes compute with them

    def __post_init__(self) -> None:
        for name in ("num_groups", "prompt_tokens", "response_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 2")
        if self.group_size < 2:
            raise InputError(f"group_size is {self.group_size}; a group of one has no advantages: give at least 2")
        most = self.config.max_position_embeddings
        if self.prompt_tokens + self.response_tokens > most:
            raise InputError(f"a prompt and a response of {self.prompt_tokens + self.response_tokens:,} tokens pass {most:,}")
        if self.prompt_tokens + self.response_tokens > self.tokens_per_pack:
            raise InputError(
                f"a rollout of {self.prompt_tokens + self.response_tokens:,} tokens is longer than a pack of "
                f"{self.tokens_per_pack:,}; raise --pack"
            )

    @property
    def num_rollouts(self) -> int:
        return self.num_groups * self.group_size

    @property
    def cache_tokens(self) -> int:
        """Pages for every prompt once, and for every response with the page that it begins in."""
        page = self.page_size
        of_prompt, of_response = (-(-count // page) + 1 for count in (self.prompt_tokens, self.response_tokens))
        return page * (self.num_groups * of_prompt + self.num_rollouts * (of_response + 1))

    @property
    def learnt_tokens(self) -> int:
        """Of one update, where every response has its full length."""
        return self.num_rollouts * self.response_tokens

    @property
    def update_tokens(self) -> int:
        """That go through the network: prompts once a group, and each response behind its prompt's last token."""
        return self.num_groups * (self.prompt_tokens - 1 + self.group_size * (self.response_tokens + 1))

    @property
    def pack_tokens(self) -> int:
        """Of the largest pack: as many whole groups as find room, or a part of one."""
        group = self.update_tokens // self.num_groups
        return min(self.tokens_per_pack // group, self.num_groups) * group or self.tokens_per_pack

    @property
    def num_packs(self) -> int:
        """Where every response has its full length."""
        return -(-self.update_tokens // self.pack_tokens)


class Counts:
    """Parameters and operations of a shape."""

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        config = shape.config
        with torch.device("meta"):
            model = KeyeModel(config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.total = sum(sizes.values())
        self.layers = sum(size for name, size in sizes.items() if ".layers." in name)
        self.head = config.vocab_size * config.hidden_size
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        share = config.num_experts_per_tok / config.num_experts
        self.active = self.layers - experts + experts * share
        # that a token's products with weights use, without the head
        self.cache_token_bytes = config.num_hidden_layers * (
            2 * config.num_key_value_heads * config.head_dim * shape.element_bytes + config.indexer.head_dim * 2
        )

    @property
    def rest(self) -> int:
        return self.total - self.layers

    def attention_flops(self, first: int, count: int) -> float:
        """Of one pass over tokens that stand behind `first` others: selected keys, and scores of all keys."""
        config = self.shape.config
        top_k = config.indexer.top_k
        seen = [first + place + 1 for place in range(count)]
        selected, scored = sum(min(one, top_k) for one in seen), sum(one for one in seen if one > top_k)
        attended = 4 * config.num_attention_heads * config.head_dim * selected
        return float(config.num_hidden_layers * (attended + 2 * config.indexer.num_heads * config.indexer.head_dim * scored))

    def prefill(self) -> Work:
        """Every prompt once; weights are read for every chunk."""
        shape = self.shape
        tokens = shape.num_groups * shape.prompt_tokens
        flops = 2 * self.active * tokens + shape.num_groups * self.attention_flops(0, shape.prompt_tokens)
        num_chunks = -(-tokens // shape.chunk_tokens)
        return Work(flops, num_chunks * self.layers * shape.element_bytes + tokens * self.cache_token_bytes)

    def decode(self) -> Work:
        """Weights and the keys of all rollouts are read for every token; logits are made and read."""
        shape, config = self.shape, self.shape.config
        flops = 2 * (self.active + self.head) * shape.learnt_tokens
        flops += shape.num_rollouts * self.attention_flops(shape.prompt_tokens, shape.response_tokens)
        keys = min(shape.prompt_tokens + shape.response_tokens / 2, config.indexer.top_k)
        # A step's tokens use all experts where they are many.
        picked = min(1.0, shape.num_rollouts * config.num_experts_per_tok / config.num_experts)
        weights = (self.layers * picked + self.head) * shape.element_bytes
        per_step = weights + shape.num_rollouts * (keys * self.cache_token_bytes + 4 * 8 * config.vocab_size)
        return Work(flops, shape.response_tokens * per_step)

    def score(self) -> Work:
        """Responses alone, behind prompts that are in the cache; logits in fp32, which are read for sums and the likeliest."""
        shape, config = self.shape, self.shape.config
        flops = 2 * (self.active + self.head) * shape.learnt_tokens
        flops += shape.num_rollouts * self.attention_flops(shape.prompt_tokens, shape.response_tokens)
        num_chunks = -(-shape.learnt_tokens // shape.chunk_tokens)
        logits = 4 * 4 * config.vocab_size * shape.learnt_tokens
        return Work(flops, num_chunks * self.layers * shape.element_bytes + logits)

    def update(self) -> Work:
        """Forward and backward passes over all packs, and one step of the optimizer."""
        shape = self.shape
        attention = shape.num_groups * self.attention_flops(0, shape.prompt_tokens)
        attention += shape.num_rollouts * self.attention_flops(shape.prompt_tokens, shape.response_tokens)
        flops = 6 * (self.active * shape.update_tokens + self.head * shape.learnt_tokens) + 3 * attention
        # A pack gathers weights (4 + 2 bytes a parameter) and adds its gradients (2 + 8); AdamW reads 16 and writes 12.
        return Work(flops, self.total * (16 * shape.num_packs + 28 + 4))

    def whole_bytes(self) -> int:
        """Of all weights as they are published."""
        return self.total * self.shape.element_bytes

    def engine_memory(self) -> dict[str, int]:
        """Bytes by part, on the engine's device."""
        shape, config = self.shape, self.shape.config
        routes = 2 * config.num_hidden_layers * config.num_experts_per_tok
        slab = 256 * config.vocab_size * 4 * 3
        steps = shape.num_rollouts * config.vocab_size * (4 * 3 + 8)
        return {
            "engine: weights": self.whole_bytes(),
            "engine: pages and routes": shape.cache_tokens * (self.cache_token_bytes + routes),
            "engine: logits of a step or slab, activations": max(slab, steps)
            + shape.chunk_tokens * config.hidden_size * config.num_experts_per_tok * 8,
        }

    def learner_memory(self, by_layer: bool) -> dict[str, int]:
        """Bytes by part, on the learner's device. by_layer: units of FSDP2 are layers, and not everything at once.

        A unit on its way is its weights in bf16, twice where the next one is gathered beside it, its gradients in bf16, and
        both sides of their sum in fp32.
        """
        shape, config = self.shape, self.shape.config
        layer = self.layers // config.num_hidden_layers
        on_the_way = max(4 * self.rest + 14 * layer, 12 * self.rest) if by_layer else 12 * self.total
        per_token = config.hidden_size * 12 + config.num_attention_heads * config.head_dim * 6
        per_token += config.num_experts_per_tok * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
        selection = SELECTION_BYTES * min(config.indexer.top_k, shape.prompt_tokens + shape.response_tokens)
        activations = shape.pack_tokens * config.num_hidden_layers * (per_token * shape.element_bytes + selection)
        # Deltas are found tensor by tensor, the largest by far being one layer's experts; places are int64 at first.
        publication = self.whole_bytes() + layer * 13
        return {
            "learner: masters in fp32": 4 * self.total,
            "learner: moments in fp32": 8 * self.total,
            "learner: gradients in fp32, or weights to publish": max(4 * self.total, publication),
            "learner: weights and gradients of units on their way": on_the_way,
            "learner: activations of a pack": activations,
        }


def check_memory(parts: dict[str, int], free_bytes: int, place: str, mend: str) -> list[str]:
    """Lines that tell of the parts.

    Raises:
        InputError: they are more than is free.
    """
    total = sum(parts.values()) + CONTEXT_BYTES
    lines = [f"| {name} | {size / GB:.2f} |" for name, size in parts.items()]
    last = f"all, of {free_bytes / GB:.1f} free on {place}"
    lines += [f"| context, graphs, fragments | {CONTEXT_BYTES / GB:.2f} |", f"| {last} | {total / GB:.2f} |"]
    if total > free_bytes:
        raise InputError(f"{place}: the step needs {total / GB:.1f} GB and {free_bytes / GB:.1f} are free; {mend}")
    return lines


def count_memory(shape: StepShape, devices: tuple[torch.device, torch.device]) -> list[str]:
    """Lines of the plan.

    Raises:
        InputError: it does not fit the GPUs, or the folder's disk.
    """
    counts = Counts(shape)
    engine = counts.engine_memory()
    learner = counts.learner_memory(counts.total > GATHERED_PARAMETERS)
    lines = ["| memory by part | GB |", "|---|---|"]
    if devices[0].type != "cuda":
        return lines + [f"| {name} | {size / GB:.3g} |" for name, size in {**engine, **learner}.items()]
    shared = (
        [(devices[0], {**engine, **learner})]
        if devices[0] == devices[1]
        else list(zip(devices, (engine, learner), strict=True))
    )
    mend = "give fewer --layers, a smaller --pack, or --learner-device another GPU"
    for device, parts in shared:
        lines += check_memory(parts, torch.cuda.mem_get_info(device)[0], str(device), mend)
    return lines


def check_disk(folder: Path, counts: Counts) -> None:
    """Raises InputError where the checkpoint and two publications find no room."""
    needed, free = 3 * counts.whole_bytes(), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: {needed / GB:.1f} GB are needed and {free / GB:.1f} are free; name another --folder")
