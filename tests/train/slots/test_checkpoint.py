"""Saving in pieces, resuming, and what is said when pieces are missing."""

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.train.slots import checkpoint
from openkeye.train.slots.checkpoint import load_state, save_state


def test_state_goes_out_in_pieces_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 100)
    tensors = {f"t{number}": torch.randn(number + 1) for number in range(20)}
    save_state(tmp_path, 1, {"old": torch.ones(3)})
    save_state(tmp_path, 7, tensors)
    step, loaded = load_state(tmp_path)
    assert step == 7 and set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert not list(tmp_path.glob("step-1-*")) and len(list(tmp_path.glob("step-7-*"))) > 1


def test_nothing_saved_is_none_and_a_missing_piece_is_named(tmp_path):
    assert load_state(tmp_path) is None
    save_state(tmp_path, 3, {"a": torch.ones(2)})
    (tmp_path / "step-3-piece-0.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-3-piece-0\.safetensors.*missing"):
        load_state(tmp_path)
