"""`config.json` in and out."""

import dataclasses
import json

import pytest

from openkeye.common.checks import InputError
from openkeye.model.config import KeyeConfig
from tests.model.naive_keye import make_config


def test_unknown_keys_come_back_and_nothing_is_added():
    raw = make_config()
    assert KeyeConfig.from_dict(raw).to_dict() == raw


def test_a_changed_field_is_written_and_unknown_keys_stay():
    config = KeyeConfig.from_dict(make_config())
    changed = dataclasses.replace(config, vocab_size=99, indexer=dataclasses.replace(config.indexer, top_k=3))
    written = changed.to_dict()
    assert (written["vocab_size"], written["sa_config"]["topk"], written["an_unknown_key"]) == (99, 3, {"is": "kept"})
    assert KeyeConfig.from_dict(written) == changed


def test_rope_base_is_found_in_either_place_and_must_be_in_one():
    raw = make_config()
    moved = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    moved["rope_parameters"] = {"rope_theta": 5e5, "mrope_section": [2, 3, 3]}
    assert KeyeConfig.from_dict(moved).rope_theta == 5e5
    assert KeyeConfig.from_dict(make_config(rope_scaling={"type": "default"})).rope_theta == 1e7
    del raw["rope_theta"]
    with pytest.raises(InputError, match="rope_theta"):
        KeyeConfig.from_dict(raw)


def test_all_missing_keys_are_named_at_once():
    raw = make_config()
    del raw["hidden_size"], raw["num_experts"], raw["rope_scaling"]
    with pytest.raises(InputError, match=r"hidden_size, num_experts, rope_scaling\.mrope_section"):
        KeyeConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [1]}, "mixture of experts"),
        ({"num_key_value_heads": 3}, "share 3"),
        ({"head_dim": 20}, "mrope_section"),
        ({"num_experts_per_tok": 9}, "exceeds num_experts"),
        ({"sa_config": {"indexer_head_dim": 24}}, "power of two"),
        ({"sa_config": {"indexer_head_dim": 8}}, "whole numbers"),
        ({"vision_config": {"hidden_act": "relu"}}, "gelu_pytorch_tanh"),
        ({"vision_config": {"num_attention_heads": 3}}, "multiple of 4"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
    ],
)
def test_what_this_architecture_cannot_be_is_refused(change, told):
    with pytest.raises(InputError, match=told):
        KeyeConfig.from_dict(make_config(**change))


def test_the_indexers_sections_are_the_main_ones_scaled():
    raw = make_config(head_dim=128, rope_scaling={"mrope_section": [16, 24, 24]}, sa_config={"indexer_head_dim": 64})
    assert KeyeConfig.from_dict(raw).index_mrope_section == (8, 12, 12)


@pytest.mark.parametrize(("text", "told"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "object")])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, told):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json.*{told}"):
        KeyeConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    assert KeyeConfig.load(tmp_path).hidden_size == 48
