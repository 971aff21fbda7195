import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openkeye.common.checks import InputError
from openkeye.distill.teacher_weights import DELTA_FILE, ResidentWeights, apply_delta, make_delta, weights_hash, write_delta
from openkeye.model.weights import load_model, save_model
from tests.distill.toy_teachers import TEXT_TOY, write_descendant, write_model


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(_bytes(a[name]), _bytes(b[name])) for name in a)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = write_model(tmp_path / "base")
    experts = next(name for name in load_model(base).state_dict() if name.endswith("gate_up_proj"))
    return {
        "base": base,
        "few": write_descendant(base, tmp_path / "few", 5),
        "experts": write_descendant(base, tmp_path / "experts", 6, (experts, "model.norm.weight"), rows=7),
        "other": write_model(tmp_path / "other", seed=2),
    }


def test_deltas_are_bit_exact_both_ways(folders):
    base = load_model(folders["base"]).state_dict()
    for name in ("few", "experts", "other"):
        other, kept = load_model(folders[name]).state_dict(), {key: value.clone() for key, value in base.items()}
        delta = make_delta(base, other)
        undo = apply_delta(base, delta)
        assert are_equal(base, other) and not are_equal(base, kept)
        apply_delta(base, undo)
        assert are_equal(base, kept)


def test_bits_count_and_not_values():
    old = {"a": torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, float("nan")]], dtype=torch.bfloat16), "b": torch.zeros(3)}
    new = {"a": old["a"].clone(), "b": torch.zeros(3)}
    assert make_delta(old, new) == {}, "the same NaN is no difference"
    new["a"][0, 0] = -0.0
    delta = make_delta(old, new)
    assert sorted(delta) == ["a.rows", "a.values"] and delta["a.rows"].tolist() == [0]
    apply_delta(old, delta)
    assert old["a"][0, 0].signbit()
    for wrong in ({"a": new["a"]}, {"a": new["a"].float(), "b": new["b"]}, {"a": new["a"][:2], "b": new["b"]}):
        with pytest.raises(ValueError, match="delta"):
            make_delta(old, wrong)


def test_only_what_differs_is_kept(folders, tmp_path):
    size = write_delta(folders["base"], folders["few"], tmp_path / "delta")
    kept = load_file(tmp_path / "delta" / DELTA_FILE)
    assert sorted(kept) == ["lm_head.weight.rows", "lm_head.weight.values"]
    assert size == 3 * 8 + 3 * TEXT_TOY.hidden_size * 4
    assert write_delta(folders["base"], folders["other"], tmp_path / "whole") > 100 * size
    assert not (tmp_path / "delta" / "model.safetensors").exists() and (tmp_path / "delta" / "config.json").is_file()
    with pytest.raises(InputError, match="not a descendant"):
        narrow = write_model(tmp_path / "narrow", config=replace(TEXT_TOY, moe_intermediate_size=8))
        write_delta(folders["base"], narrow, tmp_path / "no")


def test_hash_is_of_the_content(folders, tmp_path):
    known = weights_hash(folders["base"])
    model = load_model(folders["base"])
    save_model(model, tmp_path / "parts", shard_bytes=5000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert weights_hash(tmp_path / "parts") == known != weights_hash(folders["few"])
    write_delta(folders["base"], folders["few"], tmp_path / "delta")
    assert weights_hash(tmp_path / "delta") == weights_hash(folders["few"])
    renamed = {
        name.replace("lm_head", "head"): tensor for name, tensor in load_file(folders["base"] / "model.safetensors").items()
    }
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / "model.safetensors")
    (tmp_path / "renamed" / "config.json").write_text("{}")
    assert weights_hash(tmp_path / "renamed") != known


def test_swapping_gives_each_teacher_its_own_weights_and_loads_the_base_once(folders, tmp_path):
    for name in ("few", "experts"):
        write_delta(folders["base"], folders[name], tmp_path / f"{name}_delta")
    weights = ResidentWeights(folders["base"])
    for name in ("few", "experts", "experts", "base", "few", "base"):
        folder = folders["base"] if name == "base" else tmp_path / f"{name}_delta"
        assert are_equal(weights.use(folder).state_dict(), load_model(folders[name]).state_dict()), name
    assert (weights.figures.num_loads, weights.figures.num_swaps) == (1, 4)
    weights.use(tmp_path / "few_delta")
    assert weights.changed_names == {"lm_head.weight"}
    weights.use(tmp_path / "experts_delta")
    assert weights.changed_names == {"lm_head.weight", "model.norm.weight", "model.layers.0.mlp.experts.gate_up_proj"}
    assert weights.figures.load_seconds > 0 < weights.figures.swap_seconds
    assert are_equal(weights.use(folders["other"]).state_dict(), load_model(folders["other"]).state_dict())
    assert are_equal(weights.use(tmp_path / "few_delta").state_dict(), load_model(folders["few"]).state_dict())
    assert weights.figures.num_loads == 3 and weights.changed_names == set(load_model(folders["base"]).state_dict())


def test_a_delta_that_cannot_be_written_in_leaves_no_mixture(folders, tmp_path):
    write_delta(folders["base"], folders["few"], tmp_path / "delta")
    weights = ResidentWeights(folders["base"])
    weights.use(tmp_path / "delta")
    broken = load_file(tmp_path / "delta" / DELTA_FILE) | {"model.norm.weight": torch.zeros(5)}
    write_delta(folders["base"], folders["few"], tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / DELTA_FILE)
    with pytest.raises(RuntimeError):
        weights.use(tmp_path / "broken")
    assert are_equal(weights.use(folders["base"]).state_dict(), load_model(folders["base"]).state_dict())


def test_a_delta_of_another_base_is_refused(folders, tmp_path):
    write_delta(folders["base"], folders["few"], tmp_path / "delta")
    with pytest.raises(InputError, match="give the base that it was made from"):
        ResidentWeights(folders["other"]).use(tmp_path / "delta")
    with pytest.raises(InputError, match="base_dir"):
        ResidentWeights(None).use(tmp_path / "delta")
    with pytest.raises(InputError, match="dtype"):
        ResidentWeights(folders["base"], dtype=torch.float64).use(tmp_path / "delta")
    (tmp_path / "delta" / "delta.json").write_text(json.dumps({"base_hash": 1}))
    with pytest.raises(InputError, match="make the delta anew"):
        weights_hash(tmp_path / "delta")
