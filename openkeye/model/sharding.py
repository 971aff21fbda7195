"""One model over several processes: which part of each parameter a rank holds, and the sums that put results together.

Query heads stay with their KV head; experts and the rows of the output head are shared out; all else is whole on every rank.
What a rank computes of attention and of the experts is one summand of the residual stream: two sums over the ranks a layer.

Letters: T tokens, V vocabulary, K picked tokens, D width.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openkeye.common.checks import InputError
from openkeye.model.config import KeyeConfig

# PyTorch 2.13 gave it a new name and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
ROWS = (slice(None),)
# of a matrix: the slice of its columns stands behind it


@dataclass(frozen=True)
class Shard:
    """A rank's place among those that hold one model together; collectives are no work where it is alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    # None: the default group

    def part(self, count: int) -> slice:
        """This rank's part of so many things that lie in a row."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in x itself; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, [size, ...] in the order of the ranks."""
        x = x.contiguous()
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x, group=self.group)
        return gathered.unflatten(0, (self.size, x.shape[0]))

    def gather_columns(self, x_TV: Tensor) -> Tensor:
        """Every rank's columns beside one another."""
        return x_TV if self.size == 1 else self.gather(x_TV).transpose(0, 1).flatten(1)


ALONE = Shard()


def check_divides(config: KeyeConfig, size: int) -> None:
    """Whether a model can be shared by so many ranks.

    Raises:
        InputError: heads, experts (or the dense MLP's width) or vocabulary do not divide.
    """
    num_groups = config.num_key_value_heads
    of_mlp = ("experts", config.num_experts) if config.num_experts else ("MLP width", config.intermediate_size)
    counts = dict([("query heads", config.num_attention_heads), of_mlp, ("vocabulary", config.vocab_size)])
    odd = [f"{name} {count}" for name, count in counts.items() if count % size]
    if num_groups % size and size % num_groups:
        odd.append(f"key-value heads {num_groups}")
    if odd:
        possible = [other for other in range(1, 9) if not any(count % other for count in counts.values())]
        possible = [other for other in possible if not num_groups % other or not other % num_groups]
        raise InputError(
            f"{size} ranks cannot share this model ({', '.join(odd)}); start one of {', '.join(map(str, possible))} ranks"
        )


def local_config(config: KeyeConfig, size: int) -> KeyeConfig:
    """The heads of one rank: what its caches hold. Where there are more ranks than KV heads, some have the same one."""
    heads = config.num_attention_heads // size
    return replace(config, num_attention_heads=heads, num_key_value_heads=max(1, config.num_key_value_heads // size))


def own_part(name: str, config: KeyeConfig, shard: Shard) -> tuple[slice, ...]:
    """Which part of a published tensor a rank holds; () for all of it."""
    if shard.size == 1 or not name.startswith(("model.layers.", "lm_head.")):
        return ()
    width = config.head_dim
    queries = shard.part(config.num_attention_heads * width)
    num_groups = max(1, config.num_key_value_heads // shard.size)
    # Query heads come group after group: a rank's first one says which group it begins in.
    first = shard.rank * config.num_key_value_heads // shard.size
    groups = slice(first * width, (first + num_groups) * width)
    experts, mlp = shard.part(config.num_experts), shard.part(config.intermediate_size)
    parts = {
        ".self_attn.q_proj.weight": (queries,),
        ".self_attn.k_proj.weight": (groups,),
        ".self_attn.v_proj.weight": (groups,),
        ".self_attn.o_proj.weight": (*ROWS, queries),
        ".mlp.experts.gate_up_proj": (experts,),
        ".mlp.experts.down_proj": (experts,),
        ".mlp.gate_proj.weight": (mlp,),
        ".mlp.up_proj.weight": (mlp,),
        ".mlp.down_proj.weight": (*ROWS, mlp),
        "lm_head.weight": (shard.part(config.vocab_size),),
    }
    return next((part for ending, part in parts.items() if name.endswith(ending)), ())


def shard_model(model: nn.Module, config: KeyeConfig, shard: Shard) -> None:
    """Leave a rank its parts of a whole model, on any device, and let its modules know of the others.

    Raises:
        InputError: the model cannot be shared by so many.
    """
    check_divides(config, shard.size)
    for name, parameter in list(model.named_parameters()):
        part = own_part(name, config, shard)
        if part:
            owner, _, last = name.rpartition(".")
            kept = nn.Parameter(parameter.detach()[part].clone(memory_format=torch.contiguous_format), parameter.requires_grad)
            module = model.get_submodule(owner)
            setattr(module, last, kept)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = kept.shape
    for one in model.modules():
        if hasattr(one, "shard"):
            one.shard = shard  # type: ignore[assignment]
