"""New weights for a running engine, between two of its steps: whole tensors, or the elements that changed.

Names and layouts are the published ones. Values go into the parameters that are there, so that projections joined for
answering, captured graphs and views stay valid; experts in e4m3 are quantised again. A delta gives the same bits as the whole
tensor.

Letters: N changed elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.loop import Engine
from openkeye.kernels.dispatch import quantize_expert_weights
from openkeye.model.experts import Experts
from openkeye.model.weights import open_weights, weight_files

VISION_PREFIXES = ("visual.", "mlp_AR.")
TIED_HEAD = "lm_head.weight"
INT_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Delta:
    """The elements of one tensor that are others than before."""

    shape: tuple[int, ...]
    # of the whole
    places_N: Tensor
    # int32, or int64 where a tensor has more than 2^31 - 1 elements: in the flattened tensor, rising
    values_N: Tensor
    # the new elements, in the dtype that whole tensors are published in

    @property
    def nbytes(self) -> int:
        return self.places_N.nbytes + self.values_N.nbytes

    def apply(self, whole: Tensor) -> None:
        """Write the elements into a contiguous tensor of this shape, in its dtype."""
        whole.view(-1).index_copy_(0, self.places_N.to(whole.device).long(), self.values_N.to(whole.device, whole.dtype))


Change = Tensor | Delta


@dataclass(frozen=True)
class WeightUpdate:
    """What makes the weights of one version from those of another."""

    version: int
    # from 1 on; an engine begins with 0, the weights of its checkpoint
    changes: Mapping[str, Change]
    # by published name; a tensor that is not among them stays as it is
    base: int | None = None
    # the version that deltas and absent tensors are told against; None: everything that ever changed is there, and whole

    def __post_init__(self) -> None:
        if self.version < 1 or (self.base is not None and not 0 <= self.base < self.version):
            raise InputError(f"an update to version {self.version} from {self.base}; versions begin with 1 and rise")


def changes_between(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Change]:
    """What of `new` differs from `old` in any bit: deltas where they are smaller than whole tensors; nothing of unchanged ones.

    Raises:
        InputError: the two are not of the same names, shapes and dtypes.
    """
    changes: dict[str, Change] = {}
    if old.keys() != new.keys():
        raise InputError(f"tensors to compare differ by name: {', '.join(sorted(old.keys() ^ new.keys()))}")
    for name, tensor in new.items():
        before = old[name]
        if before.shape != tensor.shape or before.dtype != tensor.dtype:
            raise InputError(f"{name}: was {before.dtype} {list(before.shape)}, is {tensor.dtype} {list(tensor.shape)}")
        # Bits are compared: -0 is not 0, and one NaN equals itself.
        bits, before_bits = (x.contiguous().view(INT_OF_BYTES[x.element_size()]).view(-1) for x in (tensor, before))
        places = (bits != before_bits).nonzero()[:, 0]
        if not len(places):
            continue
        places = places.to(torch.int32 if tensor.numel() < 2**31 else torch.int64)
        delta = Delta(tuple(tensor.shape), places, tensor.contiguous().view(-1)[places.long()])
        changes[name] = delta if delta.nbytes < tensor.nbytes else tensor
    return changes


def apply_update(engine: Engine, update: WeightUpdate, keeps_keys: bool = False, flushes: bool = False) -> None:
    """Put an update into an engine, on the thread that steps it and between two steps.

    Pages and encoded pictures of before never serve a later request. keeps_keys, flushes: see `Scheduler.begin_weights`.

    Raises:
        InputError: an update from another version than the engine's, one that is not newer, or unknown or misshapen tensors;
            nothing has changed then. Also an engine over several ranks.
    """
    if engine.runner.model.shard.size > 1:
        raise InputError("weights are published to an engine of one rank; start one engine a GPU, or load the checkpoint anew")
    if update.version <= engine.version:
        raise InputError(f"an update to version {update.version} for an engine of version {engine.version}; give a newer one")
    if update.base is not None and update.base != engine.version:
        raise InputError(
            f"an update from version {update.base} for an engine of version {engine.version}; publish the whole weights"
        )
    put_changes(engine, update.changes, str(update.version), keeps_keys, flushes, is_whole=update.base is None)
    engine.version = update.version


def put_changes(
    engine: Engine,
    changes: Mapping[str, Change],
    name: str,
    keeps_keys: bool = False,
    flushes: bool = False,
    is_whole: bool = False,
) -> None:
    """Make an engine hold other weights, which `name` stands for: the same name must mean the same bits at any time.

    is_whole: nothing is told against what was there, so that deltas are an error.

    Raises:
        InputError: unknown or misshapen tensors, before anything has changed.
    """
    model = engine.runner.model
    parameters = dict(model.named_parameters())
    changes = {key: change for key, change in changes.items() if not (key == TIED_HEAD and key not in parameters)}
    for key, change in changes.items():
        _check(key, change, parameters, is_whole)
    with torch.no_grad():
        for key, change in changes.items():
            parameter = parameters[key]
            if parameter.dtype == torch.float8_e4m3fn:
                _put_experts(engine, key, change)
            elif isinstance(change, Delta):
                change.apply(parameter)
            else:
                parameter.copy_(change)
    salt = f"{name}:".encode()
    engine.scheduler.begin_weights(salt, keeps_keys, flushes)
    if any(key.startswith(VISION_PREFIXES) for key in changes):
        engine.runner.vision_salt = salt.decode()
    if flushes:
        engine.runner.vision_cache.clear()


def _check(name: str, change: Change, parameters: Mapping[str, Tensor], is_whole: bool) -> None:
    if name not in parameters:
        raise InputError(f"{name}: the engine's model has no such tensor; publish those of the same configuration")
    if tuple(change.shape) != tuple(parameters[name].shape):
        raise InputError(f"{name}: came as {list(change.shape)}, expected {list(parameters[name].shape)}")
    if isinstance(change, Delta):
        if is_whole:
            raise InputError(f"{name}: a delta in an update that names no base; name the version that it changes")
        if change.places_N.shape != change.values_N.shape or change.places_N.ndim != 1:
            raise InputError(f"{name}: a delta of {len(change.places_N)} places and {len(change.values_N)} values")
        if len(change.places_N) and not 0 <= int(change.places_N[0]) <= int(change.places_N[-1]) < parameters[name].numel():
            raise InputError(f"{name}: a delta with places outside of {parameters[name].numel()} elements")


def _put_experts(engine: Engine, name: str, change: Change) -> None:
    """Experts of which the engine holds e4m3 alone. Deltas change a copy in full precision, kept on the host from then on."""
    model_dtype = engine.runner.dtype
    originals = engine.runner.original_experts
    if isinstance(change, Delta):
        if name not in originals:
            originals[name] = _read_tensor(engine, name)
        change.apply(originals[name])
        whole = originals[name]
    else:
        whole = change
        # Later deltas are told against this one.
        originals[name] = change.to("cpu", copy=True)
    prefix, _, projection = name.rpartition(".")
    owner = engine.runner.model.get_submodule(prefix)
    assert isinstance(owner, Experts)
    values, scales = quantize_expert_weights(whole.to(engine.device, model_dtype))
    getattr(owner, projection).copy_(values)
    getattr(owner, projection.replace("_proj", "_scale")).copy_(scales)


def _read_tensor(engine: Engine, name: str) -> Tensor:
    for path, _ in weight_files(engine.model_dir):
        with open_weights(path) as file:
            if name in file.keys():  # noqa: SIM118 (no mapping)
                return file.get_tensor(name)
    raise InputError(f"{engine.model_dir}: {name} is not there in the fused layout; publish it whole once, deltas after that")
