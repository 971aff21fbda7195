"""Formats of the caches and of the weights: what they cost, and that an engine answers alike with any of them."""

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine import pages
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.engine.pages import CacheFormats, PagedCaches, with_cache_tokens
from openkeye.model.published import published_config
from openkeye.model.weights import load_model
from tests.engine.test_loop import QUESTIONS, chat, first_logits

CPU, GPU = torch.device("cpu"), torch.device("cuda")
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("options", "dtype", "device", "expected"),
    [
        ({}, torch.bfloat16, GPU, (torch.bfloat16, E4M3)),
        ({}, torch.float32, GPU, (torch.float32, torch.float32)),
        ({}, torch.bfloat16, CPU, (torch.bfloat16, torch.bfloat16)),
        ({"index_cache": "model"}, torch.bfloat16, GPU, (torch.bfloat16, torch.bfloat16)),
        ({"index_cache": "e4m3", "kv_cache": "e4m3"}, torch.float32, CPU, (E4M3, E4M3)),
    ],
)
def test_formats_follow_the_device_and_the_settings(options, dtype, device, expected):
    formats = CacheFormats.choose(EngineConfig(**options), device, dtype)
    assert (formats.kv, formats.index) == expected


def test_a_token_of_the_published_model_costs_what_its_authors_say():
    model = published_config("keye-vl-2.0-30b-a3b")
    assert CacheFormats(torch.bfloat16, E4M3).bytes_per_token(model) == 101_568
    assert CacheFormats(E4M3, E4M3).bytes_per_token(model) == 48 * (2 * 4 * (128 + 4) + 68)
    assert CacheFormats(torch.bfloat16, E4M3).bytes_per_token(model, has_index=False) == 48 * 2048


def test_dense_attention_keeps_no_index_keys():
    engine = Engine(attention="dense")
    assert engine.runner.caches.index_keys is None and engine.runner.caches.layer(0).index_key_SI is None


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize(
    "options", [{"index_cache": "e4m3"}, {"kv_cache": "e4m3"}, {"index_cache": "e4m3", "kv_cache": "e4m3"}]
)
def test_e4m3_caches_answer_like_the_models_own_format(video, options, attention):
    messages = chat(video, QUESTIONS[0])
    plain = Engine(attention=attention)
    stored = Engine(attention=attention, config=EngineConfig(prefill_chunk_tokens=300, **options))
    ours, theirs = (first_logits(engine, messages).log_softmax(dim=-1) for engine in (stored, plain))
    # e4m3 keeps three bits of a mantissa.
    assert float((ours.exp() * (ours - theirs)).sum()) < 0.05
    # Dense attention is none that the model was trained with; there a word may differ.
    assert attention == "dense" or stored.generate(messages).text == plain.generate(messages).text


def test_e4m3_caches_do_not_depend_on_chunks_or_company(video, other_video):
    options = {"index_cache": "e4m3", "kv_cache": "e4m3"}
    messages = [chat(video, QUESTIONS[0]), chat(other_video, QUESTIONS[1])]
    alone = [Engine(config=EngineConfig(**options)).generate(one).text for one in messages]
    together = Engine(config=EngineConfig(prefill_chunk_tokens=130, **options)).generate_batch(messages)
    assert [answer.text for answer in together] == alone


def test_experts_in_e4m3_answer_like_those_in_full(video):
    messages = chat(video, QUESTIONS[0])
    small = Engine(config=EngineConfig(experts="e4m3"))
    assert any(parameter.dtype == E4M3 for parameter in small.runner.model.parameters())
    assert small.generate(messages).text == Engine().generate(messages).text


def test_joint_projections_share_their_memory_and_change_nothing(video):
    engine = Engine()
    attention = engine.runner.model.model.layers[0].self_attn
    assert attention.joint_weight is not None
    assert attention.q_proj.weight.data_ptr() == attention.joint_weight.data_ptr()
    own, loaded = engine.runner.model.state_dict(), load_model(engine.model_dir).state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)


class FakeGpu:
    """Sizes of a GPU that is not there."""

    def __init__(self, monkeypatch, free_gib: float) -> None:
        monkeypatch.setattr(pages.torch.cuda, "mem_get_info", lambda _device: (int(free_gib * 2**30), 80 * 2**30))


def test_on_a_gpu_the_pages_take_what_the_weights_leave(monkeypatch):
    FakeGpu(monkeypatch, free_gib=30.0)
    model = published_config("keye-vl-2.0-30b-a3b")
    config = with_cache_tokens(EngineConfig(), model, GPU, torch.bfloat16, "sparse")
    assert config.cache_tokens == 26 * 2**30 // 101_568 // 64 * 64 > 262_144
    asked = EngineConfig(cache_tokens=640)
    assert with_cache_tokens(asked, model, GPU, torch.bfloat16, "sparse") is asked


def test_a_gpu_without_room_for_a_page_is_refused_with_the_numbers(monkeypatch):
    FakeGpu(monkeypatch, free_gib=3.5)
    model = published_config("keye-vl-2.0-30b-a3b")
    with pytest.raises(InputError, match=r"weights leave 3.5 of the GPU's 80.0 GiB, and 4.0 are kept for work"):
        with_cache_tokens(EngineConfig(), model, GPU, torch.bfloat16, "sparse")


def test_caches_are_slices_of_one_tensor():
    model = published_config("keye-vl-2.0-30b-a3b")
    caches = PagedCaches(model, EngineConfig(cache_tokens=64, kv_cache="e4m3", index_cache="e4m3"), CPU, torch.float32)
    layer = caches.layer(3)
    assert layer.key_SGD.shape == (64, 4, 128) and layer.key_scales_SG.shape == (64, 4)
    assert layer.index_key_SI.shape == (64, 64) and layer.index_scales_S.shape == (64,)
    assert layer.value_SGD.data_ptr() == caches.values[3].data_ptr()


@pytest.mark.parametrize(("name", "value"), [("kv_cache", "fp8"), ("index_cache", "bf16"), ("experts", "int4")])
def test_unknown_formats_are_refused_in_one_line(name, value):
    with pytest.raises(ValueError, match=f"EngineConfig.{name} is '{value}'; give auto or"):
        EngineConfig(**{name: value})
