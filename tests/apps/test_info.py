"""`openkeye info`: the published count to the last parameter, and any folder's."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openkeye.apps import info
from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig
from openkeye.engine.pages import PagedCaches
from openkeye.model.config import KeyeConfig
from openkeye.model.inventory import take_inventory
from openkeye.model.sharding import Shard, local_config
from openkeye.model.weights import load_model
from tests.model.naive_keye import make_config, make_weights, write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "image_and_video"


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["keye-vl-2.0-30b-a3b", "Kwai-Keye/Keye-VL-2.0-30B-A3B"])
def test_the_published_model_has_31122082160_parameters_in_1215_tensors(capsys, name):
    told = json.loads(shown(capsys, name, "--json"))
    assert (told["total_parameters"], told["num_tensors"]) == (31_122_082_160, 1215)
    assert told["weight_bytes"] == 62_244_164_320
    assert (told["kv_bytes_per_token"], told["index_bytes_per_token"]) == (98_304, 3_264)
    # decoder 3,461,569,536: one expert in sixteen of 28,991,029,248, all the rest of it, and no pixels
    assert told["active_parameters"] == 3_461_569_536
    parts = {part["name"]: part for part in told["parts"]}
    assert sum(part["parameters"] for part in parts.values()) == told["total_parameters"]
    assert parts["indexer"]["parameters"] == 108_536_832
    assert parts["projector"]["parameters"] == 30_686_720
    packing = parts["packing table (unused)"]
    assert (packing["parameters"], packing["num_tensors"], packing["active_parameters"]) == (32768 * 1152, 1, 0)
    assert parts["vision tower"]["parameters"] + packing["parameters"] == 450_735_984
    assert told["cache_bytes"]["256K"] == {"tokens": 262_144, "kv_bytes": 262_144 * 98_304, "index_bytes": 262_144 * 3_264}
    assert [cache["tokens"] for cache in told["cache_bytes"].values()] == [32_768, 131_072, 262_144]


def test_the_table_says_the_same(capsys):
    table = shown(capsys, "keye-vl-2.0-30b-a3b")
    total = next(line for line in table.splitlines() if "total" in line)
    assert "1,215" in total and "31,122,082,160" in total and "3,461,569,536" in total
    assert "packing table (unused)" in table
    for number in ("62,244,164,320", "3,221,225,472", "12,884,901,888", "25,769,803,776", "855,638,016", "98,304", "3,264"):
        assert number in table, number


def test_a_folder_is_counted_with_what_its_file_holds(capsys, tmp_path):
    told = json.loads(shown(capsys, GOLDEN, "--json"))
    tensors = load_file(GOLDEN / "model.safetensors")
    assert told["num_tensors"] == len(tensors)
    assert told["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    config = make_config(vision_config=None, tie_word_embeddings=True)
    weights = make_weights(config)
    told = json.loads(shown(capsys, write_checkpoint(tmp_path / "text", config, weights), "--json"))
    assert told["num_tensors"] == len(weights)
    assert told["total_parameters"] == sum(tensor.numel() for tensor in weights.values())
    (tmp_path / "text/model.safetensors").unlink()
    assert json.loads(shown(capsys, tmp_path / "text", "--json"))["num_tensors"] == len(weights), "no weights are needed"


def test_the_bundled_model_is_known_by_name(capsys):
    assert json.loads(shown(capsys, "openkeye-tiny", "--json"))["total_parameters"] < 8_388_608


def test_an_unknown_name_is_told(tmp_path):
    with pytest.raises(InputError, match=r"keye-vl-9: no such published model; known are keye-vl-2\.0-30b-a3b"):
        info.run(argparse.Namespace(model="keye-vl-9", json=False, gpu=None, gpus=1))
    with pytest.raises(InputError, match=r"config\.json"):
        info.run(argparse.Namespace(model=str(tmp_path), json=False, gpu=None, gpus=1))


@pytest.mark.parametrize(
    ("gibibytes", "fits"),
    [(80, [False, True, True, True]), (141, [True] * 4), (50, [False, False, False, True]), (24, [False] * 4)],
)
def test_what_fits_a_gpu(capsys, gibibytes, fits):
    told = json.loads(shown(capsys, "keye-vl-2.0-30b-a3b", "--gpu", gibibytes, "--json"))["gpu"]
    formats = [(row["weights"], row["kv_format"], row["index_format"]) for row in told]
    assert formats == [(w, kv, "e4m3") for w in ("bfloat16", "experts in e4m3") for kv in ("bfloat16", "e4m3")]
    # a head's 128 numbers in e4m3 have one scale of four bytes, and so has a layer's index key
    assert [row["cache_bytes_per_token"] for row in told] == [98_304 + 3_264, 48 * 2 * 4 * 132 + 3_264] * 2
    assert [row["fits_whole_context"] for row in told] == fits
    for row in told:
        used = row["weight_bytes"] + row["cache_tokens"] * row["cache_bytes_per_token"] + 4 * 2**30
        assert row["cache_tokens"] % 64 == 0 and (used <= gibibytes * 2**30 or row["cache_tokens"] == 0)
    assert shown(capsys, "keye-vl-2.0-30b-a3b", "--gpu", gibibytes).count("does not fit") == fits.count(False)


@pytest.mark.parametrize(("row", "kv_cache"), [(0, "auto"), (1, "e4m3")])
def test_the_cache_bytes_of_a_token_are_those_of_the_pages(capsys, tmp_path, row, kv_cache):
    config = make_config(num_attention_heads=8, num_key_value_heads=4, num_experts=8)
    folder = write_checkpoint(tmp_path / "m", config, make_weights(config))
    told = json.loads(shown(capsys, folder, "--gpu", 80, "--gpus", 2, "--json"))["gpu"][row]
    model = KeyeConfig.load(folder)
    settings = EngineConfig(cache_tokens=64, kv_cache=kv_cache, index_cache="e4m3")
    caches = PagedCaches(local_config(model, 2), settings, torch.device("cpu"), torch.bfloat16)
    made = sum(tensor.nbytes for tensor in vars(caches).values() if isinstance(tensor, torch.Tensor))
    assert made == 64 * told["cache_bytes_per_token"]


def test_what_fits_each_of_several_gpus(capsys):
    alone, *shared = (
        json.loads(shown(capsys, "keye-vl-2.0-30b-a3b", "--gpu", 80, "--gpus", number, "--json"))["gpu"][0]
        for number in (1, 2, 4)
    )
    for number, row in zip((2, 4), shared, strict=True):
        assert alone["weight_bytes"] / number < row["weight_bytes"] < alone["weight_bytes"] / number + 2 * 2**30
        assert row["cache_bytes_per_token"] == 98_304 // number + 3_264 and row["fits_whole_context"]
    assert "on each of 4 GPUs of 80 GiB" in shown(capsys, "keye-vl-2.0-30b-a3b", "--gpu", 80, "--gpus", 4)
    with pytest.raises(InputError, match="3 ranks cannot share this model"):
        shown(capsys, "keye-vl-2.0-30b-a3b", "--gpu", 80, "--gpus", 3)
    for words in (("--gpus", 2), ("--gpu", 80, "--gpus", 0)):
        with pytest.raises(InputError, match=r"--gpus is \d; give how many share the model"):
            shown(capsys, "openkeye-tiny", *words)


@pytest.mark.parametrize("are_experts_e4m3", [False, True])
def test_the_bytes_of_a_rank_are_those_that_it_loads(tmp_path, are_experts_e4m3):
    config = make_config(num_attention_heads=8, num_key_value_heads=4, num_experts=8)
    folder = write_checkpoint(tmp_path / "m", config, make_weights(config))
    model = load_model(folder, dtype=torch.bfloat16, are_experts_e4m3=are_experts_e4m3, shard=Shard(3, 4))
    loaded = sum(tensor.nbytes for tensor in (*model.parameters(), *(b for b in model.buffers() if b.dtype == torch.float32)))
    inventory = take_inventory(model.config, 0, 4)
    assert loaded == (inventory.weight_bytes_e4m3 if are_experts_e4m3 else inventory.weight_bytes)


def test_a_gpu_without_memory_is_refused(capsys):
    with pytest.raises(InputError, match=r"--gpu is 0\.0; give the GPU's memory in GiB"):
        shown(capsys, "openkeye-tiny", "--gpu", 0)


def test_the_bytes_of_experts_in_e4m3_are_those_of_a_loaded_model(tmp_path):
    config = make_config()
    folder = write_checkpoint(tmp_path / "m", config, make_weights(config))
    model = load_model(folder, dtype=torch.bfloat16, are_experts_e4m3=True)
    loaded = sum(tensor.nbytes for tensor in (*model.parameters(), *(b for b in model.buffers() if b.dtype == torch.float32)))
    assert take_inventory(model.config, 0).weight_bytes_e4m3 == loaded
