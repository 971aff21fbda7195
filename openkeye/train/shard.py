"""The ranks that train together, and the parameters shared out among them (FSDP2).

One process without torchrun is a group of one rank: the same code, whose collectives are copies.
"""

import functools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from openkeye.common.launch import local_rank, num_ranks, rank
from openkeye.model.decoder import DecoderLayer
from openkeye.model.keye import KeyeModel

GATHERED_PARAMETERS = 10**9
# that one rank gathers at once: with their gradients on the way they are 10 bytes each beside masters and moments


@dataclass(frozen=True)
class Ranks:
    """This process's place, and what the ranks tell one another from host to host, where no device waits."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    # ("replicate", "shard")
    saving_group: dist.ProcessGroup
    # of its own, because checkpoints are written on a thread beside the training

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks."""
        if self.size == 1:
            return values
        table = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table)
        return table.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor on the device, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def training_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def joined(device: torch.device, num_shards: int) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone, as a group while the block runs.

    num_shards: ranks that hold one copy of the weights together; it divides their number. The others replicate.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        if num_ranks() > 1:
            dist.init_process_group(backend)
        else:
            # No port, which another run on this machine might hold.
            store = dist.FileStore(os.path.join(folder, "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            size = num_ranks()
            mesh = init_device_mesh(device.type, (size // num_shards, num_shards), mesh_dim_names=("replicate", "shard"))
            yield Ranks(rank(), size, device, mesh, dist.new_group(backend="gloo"))
        finally:
            dist.destroy_process_group()


def pass_dtype(name: str, device: torch.device) -> torch.dtype:
    """What passes compute in, of `config.COMPUTE_DTYPES`; parameters and moments are fp32 always."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def shard_parameters(module: nn.Module, keye: KeyeModel, ranks: Ranks, compute_dtype: torch.dtype) -> None:
    """Share out the parameters of `module`, whose forward makes all calls of `keye`; masters stay as they are, in fp32.

    Units, over several ranks or of a large network: every decoder layer, every indexer, and the rest. The vision tower belongs
    to the rest, gathered once a pass: pictures of different sizes go through its layers in calls of their own, so that ranks
    would gather differently often, and wait for ever. An indexer stays gathered until its gradients are there, because in a
    warm-up nothing else of its layer has any and nobody would gather it again.

    Gradients are summed over ranks and never averaged: the loss is divided by the count of all ranks' tokens.
    """
    # The indexer's output is one, and nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = ranks.mesh["shard"] if ranks.mesh.size(0) == 1 else ranks.mesh
    # Inputs are not cast: rotary tables come as a record, and stay fp32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(keye) if gathers_by_layer(keye, ranks.size) else ():
        indexer = layer.self_attn.sa_indexer
        fully_shard(indexer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(indexer, "observe")
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for unit in units(module):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def gathers_by_layer(keye: KeyeModel, num_ranks: int) -> bool:
    """Whether layers are units. One rank gains nothing but room: a small network's step is as long as its hooks and copies."""
    return num_ranks > 1 or sum(parameter.numel() for parameter in keye.parameters()) > GATHERED_PARAMETERS


def units(module: nn.Module) -> list[FSDPModule]:
    """What is gathered as one."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def follow_what_trains(module: nn.Module) -> None:
    """After other parameters learn than before; all ranks call it.

    A unit notes when it is first gathered in which type its gradients are summed, and in which they are kept, from those of its
    parameters that learn just then. One of which none did would leave bf16 gradients on fp32 parameters; gathering asks anew.
    """
    for unit in units(module):
        unit.unshard()
        unit.reshard()


def decoder_layers(keye: KeyeModel) -> list[DecoderLayer]:
    """The decoder's layers under their own type."""
    return [layer for layer in keye.model.layers if isinstance(layer, DecoderLayer)]


def compile_regions(keye: KeyeModel) -> None:
    """Compile what stands between attentions, once for all layers and lengths; the past itself stays as written."""
    for layer in decoder_layers(keye):
        layer.begin = torch.compile(layer.begin, dynamic=True)  # type: ignore[method-assign]
        layer.finish = torch.compile(layer.finish, dynamic=True)  # type: ignore[method-assign]


def own_part(parameter: Tensor) -> Tensor:
    """This rank's rows, sharing memory with the parameter."""
    own = parameter.detach()
    return own.to_local() if isinstance(own, DTensor) else own


@functools.cache
def _shard_dimension(placements: tuple[Any, ...]) -> int | None:
    return next((number for number, one in enumerate(placements) if one.is_shard()), None)


def shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold this parameter's rows together; None where each holds all of them."""
    if not isinstance(parameter, DTensor):
        return None
    dimension = _shard_dimension(parameter.placements)
    return None if dimension is None else parameter.device_mesh.get_group(dimension)


def own_rows(parameter: Tensor) -> slice:
    """Which rows of the whole parameter this rank holds."""
    if not isinstance(parameter, DTensor) or (dimension := _shard_dimension(parameter.placements)) is None:
        return slice(None)
    each = -(-parameter.shape[0] // parameter.device_mesh.size(dimension))
    first = min(each * parameter.device_mesh.get_local_rank(dimension), parameter.shape[0])
    return slice(first, min(first + each, parameter.shape[0]))


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which `part` is this rank's rows as they are of `like`; all ranks call it."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()
