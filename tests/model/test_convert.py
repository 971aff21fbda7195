"""Checkpoints of other families, made by transformers with random weights, against transformers' own logits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openkeye.common.checks import InputError
from openkeye.kernels.dispatch import index_scores
from openkeye.model import convert
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.convert import convert_checkpoint
from openkeye.model.fresh_indexer import fresh_indexers
from openkeye.model.indexer import Indexer
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.model.rotary import mrope_table
from openkeye.model.weights import load_model
from tests.model.naive_keye import make_config
from tests.model.other_families import SHAPE, write_source

INDEXER = IndexerConfig(num_heads=4, head_dim=16, top_k=8)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.inference_mode()
def logits_of(model: KeyeModel, ids: torch.Tensor, past: PlainPast) -> torch.Tensor:
    return model.logits(model(model.embed(ids, None, None), torch.arange(len(ids)).expand(3, -1), past))


def prompt(length: int = 60) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(3))


CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, all heads of their own": ("Llama", {"num_key_value_heads": 6}),
    "llama, four queries a key, head width from hidden": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama, longer context": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
    "qwen3 moe, shares not normalised": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "num_key_value_heads": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    family, changes = CASES[case]
    source, twin = write_source(tmp_path / "source", family, **changes)
    convert_checkpoint(source, tmp_path / "keye", INDEXER, seed=1)
    model = load_model(tmp_path / "keye")
    ids = prompt()
    with torch.inference_mode():
        expected = twin(ids[None]).logits[0]
    assert expected.std() > 0.1, "a flat output would prove nothing"
    dense = logits_of(model, ids, PlainPast(8, "dense"))
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=2e-5)
    # A top-k that holds the whole context selects everything.
    torch.testing.assert_close(logits_of(model, ids, PlainPast(60)), dense, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(logits_of(model, ids, PlainPast(8)), dense, rtol=1e-2, atol=1e-2)


def test_all_weights_are_copied_bit_for_bit_and_experts_of_both_layouts_alike(tmp_path):
    source, twin = write_source(tmp_path / "source", "Qwen3Moe", **EXPERTS)
    written = load_file(source / "model.safetensors")
    separate = {name for name in written if re.search(r"experts\.\d+\.", name)}
    assert separate, "save_pretrained writes expert by expert"
    convert_checkpoint(source, tmp_path / "a", INDEXER, seed=5)
    fused = {name: tensor for name, tensor in twin.state_dict().items() if name not in separate}
    save_file({name: tensor.contiguous() for name, tensor in fused.items()}, source / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    convert_checkpoint(source, tmp_path / "b", INDEXER, seed=5)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(
        a["model.layers.1.mlp.experts.down_proj"][3], written["model.layers.1.mlp.experts.3.down_proj.weight"].t()
    )
    assert all(torch.equal(a[name], written[name]) for name in written if name not in separate)


def test_shards_come_and_go(tmp_path):
    source, _ = write_source(tmp_path / "source", "Qwen3", dtype="bfloat16")
    convert_checkpoint(source, tmp_path / "one", INDEXER)
    convert_checkpoint(source, tmp_path / "many", INDEXER, shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "many" / "model.safetensors").exists()
    whole, parts = (load_model(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    # And a source in shards.
    for path in (tmp_path / "many").glob("model*"):
        path.rename(source / path.name)
    (source / "model.safetensors").unlink()
    tensors = {name: tensor for path in source.glob("model-*") for name, tensor in load_file(path).items()}
    index = {"weight_map": {name: "model.safetensors" for name in tensors if "sa_indexer" not in name}}
    save_file({name: tensors[name] for name in index["weight_map"]}, source / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_checkpoint(source, tmp_path / "again", INDEXER)
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_new_configuration_is_read_back_as_itself(tmp_path):
    source, _ = write_source(tmp_path / "source", rope_parameters=LLAMA3)
    config = convert_checkpoint(source, tmp_path / "keye", INDEXER)
    assert KeyeConfig.load(tmp_path / "keye") == config
    assert (config.num_experts, config.intermediate_size, config.use_qk_norm, config.vision) == (0, 80, False, None)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8.0
    changed = KeyeConfig.from_dict(config.to_dict() | {"rms_norm_eps": 1e-5})
    assert KeyeConfig.from_dict(changed.to_dict()) == changed
    rebuilt = KeyeConfig(**{**vars(config), "raw": {}})
    assert KeyeConfig.from_dict(rebuilt.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen2"}, r"model_type is 'qwen2'; what can be converted is llama"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3' lacks factor"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0], **EXPERTS}, "mixture of experts"),
        ({"intermediate_size": 81}, r"gate_proj.weight is \[80, 48\] instead of \[81, 48\]"),
        ({"model_type": "qwen3"}, r"missing model.layers.0.self_attn.q_norm.weight"),
        ({"num_hidden_layers": 1}, r"unknown model.layers.1.input_layernorm.weight"),
        ({"hidden_size": None, "eos_token_id": None}, "lacks hidden_size"),
    ],
)
def test_what_would_compute_otherwise_is_refused(tmp_path, changes, told):
    source, _ = write_source(tmp_path / "source")
    rewrite(source / "config.json", **changes)
    with pytest.raises(InputError, match=told) as refusal:
        convert_checkpoint(source, tmp_path / "keye", INDEXER)
    assert "\n" not in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tokenizer"}


def test_quantised_weights_are_refused(tmp_path):
    source, _ = write_source(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is F8_E4M3; give the checkpoint in bfloat16"):
        convert_checkpoint(source, tmp_path / "keye", INDEXER)


def test_a_head_unlike_tied_embeddings_is_refused(tmp_path):
    source, _ = write_source(tmp_path / "source")
    rewrite(source / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match="unlike the embeddings"):
        convert_checkpoint(source, tmp_path / "keye", INDEXER)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    source, _ = write_source(tmp_path / "source")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        convert_checkpoint(source, tmp_path / "used", INDEXER)
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", INDEXER)
    assert load_model(tmp_path / "empty").config.indexer == INDEXER

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_write_others", full)
    with pytest.raises(InputError, match="No space left"):
        convert_checkpoint(source, tmp_path / "new", INDEXER)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tokenizer", "used", "empty"}
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        convert_checkpoint(source, tmp_path / "new", INDEXER)


@pytest.mark.parametrize(("heads", "gain"), [(2, 0.03), (8, 1.0), (16, 4.7)])
def test_fresh_scores_spread_by_a_third_whatever_the_norms_gain(heads, gain):
    raw = make_config(vision_config=None, hidden_size=256, sa_config={"indexer_num_heads": heads}, dtype="float32")
    config = KeyeConfig.from_dict(raw)
    generator = torch.Generator().manual_seed(0)
    gains = [gain * (1 + 0.3 * torch.randn(256, generator=generator)) for _ in range(2)]
    tensors = fresh_indexers(config, gains, seed=7)
    for number in range(2):
        prefix = f"model.layers.{number}.self_attn.sa_indexer."
        indexer = Indexer(config)
        indexer.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        hidden = torch.randn(400, 256, generator=generator)
        hidden = hidden / hidden.square().mean(dim=1, keepdim=True).sqrt() * gains[number]
        tables = mrope_table(torch.arange(400).expand(3, -1), config.index_mrope_section, config.rope_theta)
        with torch.no_grad():
            output = indexer(indexer.q_proj(hidden), indexer.k_proj(hidden), *tables)
        scores = index_scores(output.query_TJI, output.gates_TJ, output.key_TI)
        assert 0.2 < scores.std() < 0.4
    again, other = fresh_indexers(config, gains, seed=7), fresh_indexers(config, gains, seed=8)
    name = "model.layers.1.self_attn.sa_indexer.k_proj.weight"
    assert torch.equal(again[name], tensors[name]) and not torch.equal(other[name], tensors[name])
