"""Saving and resuming a run: safetensors pieces small enough to carry anywhere, the last good one always loadable."""

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from openkeye.common.checks import InputError

PIECE_BYTES = 15 << 20


def save_state(run_dir: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write `step-N-piece-i.safetensors`, then point `latest.json` at them in one atomic rename, then drop older pieces."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > PIECE_BYTES and pieces[-1]:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor.detach().cpu().contiguous()
        size += num_bytes
    names = [f"step-{step}-piece-{number}.safetensors" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        save_file(piece, run_dir / name)
    pointer = run_dir / "latest.json.new"
    pointer.write_text(json.dumps({"step": step, "pieces": names}))
    os.replace(pointer, run_dir / "latest.json")
    for old in run_dir.glob("step-*-piece-*.safetensors"):
        if old.name not in names:
            old.unlink()


def load_state(run_dir: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The latest saved step and its tensors on the CPU, or None where nothing was saved.

    Raises:
        InputError: `latest.json` names pieces that are missing or unreadable.
    """
    pointer = run_dir / "latest.json"
    if not pointer.exists():
        return None
    record = json.loads(pointer.read_text())
    tensors: dict[str, Tensor] = {}
    for name in record["pieces"]:
        if not (run_dir / name).exists():
            raise InputError(f"{pointer} names {name}, which is missing: restore it, or delete {pointer} to start over")
        tensors.update(load_file(run_dir / name))
    return record["step"], tensors


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix.`"""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix.`, without it: the inverse of `prefixed`."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
