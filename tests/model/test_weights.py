"""Checkpoints in and out: every tensor exactly once, every problem told in one error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openkeye.common.checks import InputError
from openkeye.kernels import reference
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import count_packing_parameters, load_model, save_model
from tests.model.naive_keye import make_config, make_weights, write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "image_and_video"
PACKING = "visual.vision_model.embeddings.packing_position_embedding.weight"


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def write(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    config = make_config(**changes)
    return write_checkpoint(folder, config, make_weights(config) if weights is None else weights)


def write_shards(folder: Path, files: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config()))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def unfuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in weights.items():
        prefix, _, last = name.rpartition(".")
        for expert in range(tensor.shape[0] if ".experts." in name else 0):
            if last == "gate_up_proj":
                gate, up = tensor[expert].t().contiguous().chunk(2)
                result |= {f"{prefix}.{expert}.gate_proj.weight": gate.clone(), f"{prefix}.{expert}.up_proj.weight": up.clone()}
            else:
                result[f"{prefix}.{expert}.down_proj.weight"] = tensor[expert].t().contiguous()
        if ".experts." not in name:
            result[name] = tensor
    return result


@pytest.mark.parametrize("shard_bytes", [5 << 30, 20_000])
def test_load_save_load_gives_identical_tensors_and_config(tmp_path, shard_bytes):
    save_model(load_model(GOLDEN), tmp_path / "saved", shard_bytes)
    assert_same(all_tensors(tmp_path / "saved"), all_tensors(GOLDEN))
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (shard_bytes > 20_000)
    again = load_model(tmp_path / "saved")
    assert_same(dict(again.state_dict()), dict(load_model(GOLDEN).state_dict()))
    save_model(again, tmp_path / "twice")
    assert_same(all_tensors(tmp_path / "twice"), all_tensors(GOLDEN))


def test_shards_stay_below_the_limit_and_the_index_names_each_tensor_once(tmp_path):
    limit = 30_000
    save_model(load_model(write(tmp_path / "m")), tmp_path / "saved", limit)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    total = 0
    for path in (tmp_path / "saved").glob("*.safetensors"):
        tensors = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        total += size
        assert size <= limit or len(tensors) == 1
    assert index["metadata"]["total_size"] == total


def test_saving_over_the_folder_a_model_came_from_is_safe(tmp_path):
    folder = write(tmp_path / "m")
    before = all_tensors(folder)
    model = load_model(folder)
    for shard_bytes in (20_000, 50_000, 5 << 30, 5 << 30):
        save_model(model, folder, shard_bytes)
        assert_same(all_tensors(folder), before)
        assert_same(dict(load_model(folder).state_dict()), dict(model.state_dict()))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_packing_table_is_no_parameter_and_is_written_back(tmp_path):
    model = load_model(GOLDEN, dtype=torch.float32)
    assert not any("packing" in name for name in (*model.state_dict(), *dict(model.named_buffers())))
    save_model(model, tmp_path)
    original = load_file(GOLDEN / "model.safetensors")[PACKING]
    assert torch.equal(load_file(tmp_path / "model.safetensors")[PACKING], original)
    assert original.dtype == torch.bfloat16, "kept in its own type, whatever the model's"
    assert count_packing_parameters(tmp_path) == original.numel()
    assert count_packing_parameters(write(tmp_path / "text", vision_config=None)) == 0


def test_a_checkpoint_without_the_packing_table_loads(tmp_path):
    weights = make_weights(make_config())
    del weights[PACKING]
    assert load_model(write(tmp_path / "m", weights)).kept_tensors == ()


def test_dtype_is_kept_or_converted(tmp_path):
    weights = make_weights(make_config())
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    folder = write(tmp_path / "m", weights)
    model = load_model(folder)
    assert (model.model.norm.weight.dtype, model.lm_head.weight.dtype) == (torch.bfloat16, torch.float32)
    assert {tensor.dtype for tensor in load_model(folder, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}


def test_unfused_experts_are_stacked(tmp_path):
    weights = make_weights(make_config())
    fused, unfused = load_model(write(tmp_path / "a", weights)), load_model(write(tmp_path / "b", unfuse(weights)))
    assert_same(dict(unfused.state_dict()), dict(fused.state_dict()))


def test_rotary_buffers_are_ignored(tmp_path):
    weights = make_weights(make_config())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    load_model(write(tmp_path / "m", weights))


def test_every_problem_is_listed_in_one_error(tmp_path):
    weights = make_weights(make_config())
    del weights["model.norm.weight"], weights["mlp_AR.linear_1.bias"]
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
    weights["model.layers.1.mlp.experts.down_proj"] = weights["model.layers.1.mlp.experts.down_proj"].mT.contiguous()
    weights |= {"model.layers.7.input_layernorm.weight": torch.zeros(48), "surprise": torch.zeros(1)}
    with pytest.raises(InputError) as caught:
        load_model(write(tmp_path / "m", weights))
    told = str(caught.value)
    assert "\n" not in told
    assert "missing: mlp_AR.linear_1.bias, model.norm.weight" in told
    assert "unknown: model.layers.7.input_layernorm.weight, surprise" in told
    assert "model.layers.0.self_attn.q_proj.weight [3, 4] instead of [64, 48]" in told
    assert "model.layers.1.mlp.experts.down_proj [6, 48, 24] instead of [6, 24, 48]" in told


def test_problems_of_unfused_experts_are_listed(tmp_path):
    weights = unfuse(make_weights(make_config()))
    prefix = "model.layers.0.mlp.experts"
    del weights[f"{prefix}.2.up_proj.weight"]
    weights[f"{prefix}.3.down_proj.weight"] = torch.zeros(2, 2)
    weights[f"{prefix}.6.gate_proj.weight"] = torch.zeros(24, 48)
    with pytest.raises(InputError) as caught:
        load_model(write(tmp_path / "m", weights))
    told = str(caught.value)
    assert f"missing: {prefix}.2.up_proj.weight;" in told or f"missing: {prefix}.2.up_proj.weight)" in told
    assert f"{prefix}.3.down_proj.weight [2, 2] instead of [48, 24]" in told
    assert f"unknown: {prefix}.6.gate_proj.weight" in told


def test_fused_and_unfused_names_of_one_layer_are_a_problem(tmp_path):
    weights = make_weights(make_config())
    with pytest.raises(InputError, match=r"twice: .*experts\.down_proj, .*experts\.gate_up_proj"):
        load_model(write(tmp_path / "m", weights | unfuse(weights)))


def test_shards_with_one_tensor_twice_are_refused(tmp_path):
    weights = make_weights(make_config())
    extra = {"model.norm.weight": weights["model.norm.weight"].clone()}
    weight_map = dict.fromkeys(weights, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    head = {"lm_head.weight": weights["lm_head.weight"]}
    rest = {name: tensor for name, tensor in weights.items() if name not in head}
    good = write_shards(tmp_path / "good", {"a.safetensors": rest, "b.safetensors": head}, weight_map)
    load_model(good)
    bad = write_shards(tmp_path / "bad", {"a.safetensors": rest, "b.safetensors": head | extra}, weight_map)
    with pytest.raises(InputError, match=r"twice: model\.norm\.weight"):
        load_model(bad)


def test_a_shard_without_what_the_index_promises_is_refused(tmp_path):
    weights = make_weights(make_config())
    rest = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    folder = write_shards(tmp_path / "m", {"a.safetensors": rest}, dict.fromkeys(weights, "a.safetensors"))
    with pytest.raises(InputError, match=r"not in a\.safetensors: model\.norm\.weight; missing: model\.norm\.weight"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_a_broken_index_is_told(tmp_path, text):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: not a weight index"):
        load_model(folder)


def test_missing_and_broken_files_are_told(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_model(tmp_path / "nowhere")
    folder = write(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    for broken in (b"", b"not weights at all", whole[: len(whole) // 2]):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
            load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
    with pytest.raises(InputError, match=r"shards missing that the index names: model-1\.safetensors"):
        load_model(folder)


def test_tied_embeddings_have_one_tensor_and_an_equal_head_is_tolerated(tmp_path):
    weights = make_weights(make_config(tie_word_embeddings=True))
    folder = write(tmp_path / "m", weights, tie_word_embeddings=True)
    model = load_model(folder)
    assert "lm_head.weight" not in model.state_dict()
    hidden = torch.randn(2, 48)
    torch.testing.assert_close(model.logits(hidden), hidden @ weights["model.embed_tokens.weight"].T)
    save_model(model, tmp_path / "saved")
    assert_same(all_tensors(tmp_path / "saved"), weights)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    load_model(write(tmp_path / "same", weights | head, tie_word_embeddings=True))
    head["lm_head.weight"][0, 0] += 1
    with pytest.raises(InputError, match=r"tie_word_embeddings is true: lm_head\.weight"):
        load_model(write(tmp_path / "other", weights | head, tie_word_embeddings=True))


def test_a_fresh_model_saves_a_whole_config(tmp_path):
    config = KeyeConfig.from_dict(make_config())
    model = KeyeModel(config)
    save_model(model, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert load_model(tmp_path / "copy").config == config


@pytest.mark.parametrize("is_unfused", [False, True])
def test_experts_come_in_as_e4m3_with_their_scales(tmp_path, is_unfused):
    weights = make_weights(make_config())
    folder = write(tmp_path / "m", unfuse(weights) if is_unfused else weights)
    plain, small = load_model(folder), load_model(folder, are_experts_e4m3=True)
    kinds = {name: parameter.dtype for name, parameter in small.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn} == {n for n in kinds if ".experts." in n}
    layer, its = plain.model.layers[0].mlp, small.model.layers[0].mlp
    values, scales = reference.quantize_expert_weights(layer.experts.gate_up_proj)
    assert torch.equal(its.experts.gate_up_proj.float(), values.float()) and torch.equal(its.experts.gate_up_scale, scales)
    x = torch.randn(9, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    assert float((its(x) - expected).norm() / expected.norm()) < 0.05
    assert not torch.equal(its(x), expected)


def test_experts_in_e4m3_are_not_saved(tmp_path):
    model = load_model(write(tmp_path / "m"), are_experts_e4m3=True)
    with pytest.raises(ValueError, match="for answering and cannot be saved"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
