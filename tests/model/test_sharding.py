"""Ranks that share a model: what each reads, and that together they compute what one does."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.model import weights as weights_module
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.convert import convert_checkpoint
from openkeye.model.published import published_config
from openkeye.model.sharding import ALONE, Shard, check_divides, own_part, shard_model
from openkeye.model.weights import load_model, save_model
from tests.model.naive_keye import make_config, make_weights, write_checkpoint
from tests.model.other_families import write_source
from tests.model.sharded_forward import run
from tests.model.test_weights import unfuse
from tests.rank_processes import run_ranks

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3}
SIZES = (2, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = make_config(**SHAPE)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config, make_weights(config))


@pytest.mark.parametrize("are_experts_e4m3", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_loads_its_parts_of_the_whole_model(folder, size, are_experts_e4m3):
    whole = load_model(folder, are_experts_e4m3=are_experts_e4m3)
    for rank in range(size):
        shard = Shard(rank, size)
        part = load_model(folder, are_experts_e4m3=are_experts_e4m3, shard=shard)
        tensors = dict(whole.state_dict())
        assert {name for name in tensors if own_part(name, whole.config, shard)}
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor.float(), tensors[name].float()[own_part(name, whole.config, shard)]), name
            assert tensor.is_contiguous() and tensor.dtype == tensors[name].dtype
        linears = [module for module in part.modules() if isinstance(module, torch.nn.Linear)]
        assert all(module.weight.shape == (module.out_features, module.in_features) for module in linears)
        experts = slice(rank * 8 // size, (rank + 1) * 8 // size)
        for one, all_of_it in zip(part.model.layers, whole.model.layers, strict=True):
            if are_experts_e4m3:
                assert torch.equal(one.mlp.experts.gate_up_scale, all_of_it.mlp.experts.gate_up_scale[experts])
                assert torch.equal(one.mlp.experts.down_scale, all_of_it.mlp.experts.down_scale[experts])
            assert one.self_attn.shard == one.mlp.shard == part.shard == shard and all_of_it.self_attn.shard == ALONE


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_are_the_whole_and_no_row_is_held_twice(folder, size):
    whole = load_model(folder)
    for name, tensor in whole.state_dict().items():
        parts = [tensor[own_part(name, whole.config, Shard(rank, size))] for rank in range(size)]
        shared = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", ".mlp.experts.", "lm_head.")
        is_shared = any(mark in name for mark in shared) and not any(mark in name for mark in ("visual.", "sa_indexer"))
        assert sum(part.numel() for part in parts) == tensor.numel() * (1 if is_shared else size), name
        if is_shared:
            assert torch.equal(torch.cat(parts, dim=int("o_proj" in name)), tensor)


def test_shards_of_files_and_experts_one_by_one_load_alike(folder, tmp_path):
    save_model(load_model(folder), tmp_path / "files", 20_000)
    config = make_config(**SHAPE)
    write_checkpoint(tmp_path / "unfused", config, unfuse(make_weights(config)))
    for rank in range(4):
        expected = load_model(folder, shard=Shard(rank, 4)).state_dict()
        for other in ("files", "unfused"):
            found = load_model(tmp_path / other, shard=Shard(rank, 4)).state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_an_expert_that_is_missing_is_told_by_its_rank(tmp_path):
    config = make_config(**SHAPE)
    tensors = unfuse(make_weights(config))
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    write_checkpoint(tmp_path / "m", config, tensors)
    load_model(tmp_path / "m", shard=Shard(0, 4))
    with pytest.raises(InputError, match=r"missing: model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        load_model(tmp_path / "m", shard=Shard(2, 4))


def test_other_ranks_parts_are_not_read(folder, monkeypatch):
    num_read = 0

    class File:
        def __init__(self, file: Any, name: str = "") -> None:
            self.file, self.name = file, name

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            return count(self.file.get_tensor(name))

        def get_slice(self, name: str) -> "File":
            return File(self.file.get_slice(name))

        def get_shape(self) -> list[int]:
            return self.file.get_shape()

        def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
            return count(self.file[part])

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_read
        num_read += tensor.nbytes
        return tensor

    opened = weights_module.open_weights

    @contextmanager
    def open_weights(path: Path):
        with opened(path) as file:
            yield File(file)

    monkeypatch.setattr(weights_module, "open_weights", open_weights)
    held = sum(tensor.nbytes for tensor in load_model(folder, shard=Shard(1, 4)).state_dict().values())
    assert num_read == held
    load_model(folder)
    assert num_read - held > 1.5 * held


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_does(folder, tmp_path, size):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 60, (70,), generator=generator)
    ids[10:18] = 61
    positions = torch.arange(70).expand(3, 70) + torch.tensor([[0], [1], [2]])
    pixels = torch.randn(32, 3, 14, 14, generator=generator)
    given = {"ids": ids, "positions": positions, "pixels": pixels, "grid": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    torch.save(given, tmp_path / "input.pt")
    results = run_ranks(size, "tests.model.sharded_forward", folder, tmp_path / "input.pt", tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    for are_experts_e4m3 in (False, True):
        expected = run(load_model(folder, dtype=torch.float32, are_experts_e4m3=are_experts_e4m3), given)
        found = [torch.load(tmp_path / f"{rank}-{are_experts_e4m3}.pt") for rank in range(size)]
        for result in found:
            assert torch.equal(result["selected"], expected["selected"])
            torch.testing.assert_close(result["hidden"], expected["hidden"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                result["logits"].log_softmax(-1), expected["logits"].log_softmax(-1), atol=1e-5, rtol=1e-5
            )
            # Every rank routes and selects for itself: the sums must be the same bits everywhere.
            assert torch.equal(result["hidden"], found[0]["hidden"]) and torch.equal(result["logits"], found[0]["logits"])
    assert expected["selected"].shape[-1] < 70, "some tokens must select"


def test_two_ranks_compute_a_dense_model_without_head_norms(tmp_path):
    source, _ = write_source(tmp_path / "source", num_key_value_heads=2)
    convert_checkpoint(source, tmp_path / "keye", IndexerConfig(num_heads=2, head_dim=16, top_k=8))
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(3))
    given = {"ids": ids, "positions": torch.arange(40).expand(3, 40)}
    torch.save(given, tmp_path / "input.pt")
    results = run_ranks(2, "tests.model.sharded_forward", tmp_path / "keye", tmp_path / "input.pt", tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    whole = load_model(tmp_path / "keye", dtype=torch.float32)
    assert load_model(tmp_path / "keye", shard=Shard(1, 2)).model.layers[0].mlp.down_proj.weight.shape == (48, 40)
    expected = run(whole, given)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}-False.pt")
        assert torch.equal(found["selected"], expected["selected"])
        torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
    with pytest.raises(
        InputError, match=r"3 ranks .*\(MLP width 80, vocabulary 308, key-value heads 2\); start one of 1, 2 ranks"
    ):
        check_divides(whole.config, 3)


def test_tied_embeddings_are_a_head_of_parts(tmp_path):
    config = make_config(**SHAPE, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "m", config, make_weights(config))
    whole, hidden = load_model(folder), torch.randn(3, config["hidden_size"])
    shards = [Shard(rank, 4) for rank in range(4)]
    rows = [whole.model.embed_tokens.weight[shard.part(config["vocab_size"])] for shard in shards]
    parts = [load_model(folder, shard=shard) for shard in shards]
    assert all(torch.equal(part.model.embed_tokens.weight, whole.model.embed_tokens.weight) for part in parts)
    torch.testing.assert_close(torch.cat([hidden @ part.t() for part in rows], dim=1), whole.logits(hidden))


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        (
            {},
            3,
            r"3 ranks cannot share this model \(query heads 8, experts 8, vocabulary 64, key-value heads 4\); start",
        ),
        ({"num_experts": 6}, 4, r"4 ranks .* \(experts 6\); start one of 1, 2 ranks"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, r"\(key-value heads 3\); start one of 1 ranks"),
        ({"vocab_size": 66}, 4, r"\(vocabulary 66\); start one of 1, 2 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(changes, size, said):
    config = KeyeConfig.from_dict(make_config(**{**SHAPE, **changes}))
    with pytest.raises(InputError, match=said) as caught:
        check_divides(config, size)
    assert "\n" not in str(caught.value)


def test_the_published_model_is_shared_by_two_and_four():
    for size in (1, 2, 4):
        check_divides(published_config("keye-vl-2.0-30b-a3b"), size)


def test_one_ranks_part_is_not_saved(folder, tmp_path):
    with pytest.raises(ValueError, match="one rank's part of a model cannot be saved"):
        save_model(load_model(folder, shard=Shard(0, 2)), tmp_path)


def test_a_whole_model_can_be_cut_where_it_stands(folder):
    model = load_model(folder)
    shard_model(model, model.config, Shard(1, 2))
    expected = load_model(folder, shard=Shard(1, 2)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
