"""Norms, rotary, Hadamard and cache writes in one kernel, against the plain steps one after the other."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import norm_rotary, reference
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.indexer import Indexer
from openkeye.model.rotary import mrope_table

# Triton's interpreter cuts bfloat16 off instead of rounding it, at each of three steps.
TOLERANCES = {torch.float32: (2e-6, 2e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
EPS = 1e-6


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def tables(num_tokens: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Of positions far into a long video, other ones on every axis."""
    positions = torch.randint(0, 200_000, (3, num_tokens), generator=torch.Generator().manual_seed(3))
    cos, sin = mrope_table(positions, (width // 8, width // 8, width // 4), 1e6)
    return cos.to(device), sin.to(device)


def close(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype and result.shape == expected.shape
    atol, rtol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(result, expected, atol=atol, rtol=rtol)


def attention_case(num_tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Projections as the columns of a joint one, weights, tables."""
    joint = draw(num_tokens, (heads + 2 * groups) * width, seed=0, dtype=dtype, device=device) * 3
    query, key, value = joint.split([heads * width, groups * width, groups * width], dim=1)
    weights = [1 + 0.2 * draw(width, seed=seed, dtype=dtype, device=device) for seed in (1, 2)]
    return [query, key, value, *weights, *tables(num_tokens, width, device)]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("num_tokens", "heads", "groups", "width"), [(1, 32, 4, 128), (7, 3, 3, 32), (33, 9, 3, 16)])
def test_queries_and_keys_equal_the_plain_steps(device, num_tokens, heads, groups, width, dtype):
    query, key, _, *rest = attention_case(num_tokens, heads, groups, width, dtype, device)
    result = norm_rotary.norm_rotary(query, key, *rest, EPS)
    for tensor, expected in zip(result, reference.norm_rotary(query, key, *rest, EPS), strict=True):
        close(tensor, expected)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_heads_without_norms_are_turned_as_they_come(device, dtype):
    query, key, value, *_, cos, sin = attention_case(7, 9, 3, 64, dtype, device)
    result = norm_rotary.norm_rotary(query, key, None, None, cos, sin, EPS)
    for tensor, x in zip(result, (query, key), strict=True):
        close(tensor, reference.apply_rotary(x.unflatten(1, (-1, 64)), cos, sin))
    for tensor, expected in zip(result, reference.norm_rotary(query, key, None, None, cos, sin, EPS), strict=True):
        close(tensor, expected)
    slots = torch.tensor([4, 0, 6, -1, 7, 2, 1], device=device)
    mine, twins = filled_caches((8, 3, 64), dtype, device, 2)
    case = (query, key, value, None, None, cos, sin, EPS, slots)
    close(norm_rotary.norm_rotary_write(*case, *mine), reference.norm_rotary_write(*case, *twins))
    for cache, expected in zip(mine, twins, strict=True):
        atol, rtol = TOLERANCES[dtype]
        torch.testing.assert_close(cache, expected, atol=atol, rtol=rtol, equal_nan=True)


def filled_caches(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int) -> list[list[Tensor]]:
    """The same caches of NaN, for the kernel and for its twin."""
    return [[torch.full(shape, float("nan"), device=device).to(dtype) for _ in range(count)] for _ in range(2)]


@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32])
def test_slots_are_written_and_all_others_left_alone(device, slot_dtype):
    case = attention_case(6, 4, 2, 32, torch.float32, device)
    slots = torch.tensor([17, 3, -1, 0, 22, 9], dtype=slot_dtype, device=device)
    mine, twins = filled_caches((23, 2, 32), torch.float32, device, 2)
    close(norm_rotary.norm_rotary_write(*case, EPS, slots, *mine), reference.norm_rotary_write(*case, EPS, slots, *twins))
    for cache, expected in zip(mine, twins, strict=True):
        assert cache.isnan().sum() == (23 - 5) * 2 * 32
        torch.testing.assert_close(cache, expected, atol=2e-6, rtol=2e-5, equal_nan=True)


def test_caches_may_be_parts_of_larger_ones(device):
    case = attention_case(3, 4, 2, 32, torch.float32, device)
    slots = torch.tensor([4, 0, 2], device=device)
    whole = torch.full((5, 2, 2, 32), float("nan"), device=device)
    norm_rotary.norm_rotary_write(*case, EPS, slots, whole[:, 0], whole[:, 1])
    plain = filled_caches((5, 2, 32), torch.float32, device, 2)[0]
    norm_rotary.norm_rotary_write(*case, EPS, slots, *plain)
    for part, expected in zip((whole[:, 0], whole[:, 1]), plain, strict=True):
        torch.testing.assert_close(part, expected, atol=0, rtol=0, equal_nan=True)


def test_chunks_write_what_one_call_writes(device):
    case = attention_case(11, 4, 2, 32, torch.float16, device)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(4))[:11].to(device)
    once, chunked = filled_caches((16, 2, 32), torch.float16, device, 2)
    whole = norm_rotary.norm_rotary_write(*case, EPS, slots, *once)
    tokens = [0, 1, 2, 5, 6]
    # of the arguments, those with one row a token
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 11)):
        part = [tensor[rows] if number in tokens else tensor for number, tensor in enumerate(case)]
        parts.append(norm_rotary.norm_rotary_write(*part, EPS, slots[rows], *chunked))
    assert torch.equal(torch.cat(parts), whole)
    for cache, expected in zip(chunked, once, strict=True):
        torch.testing.assert_close(cache, expected, atol=0, rtol=0, equal_nan=True)


def quantised_agree(codes: Tensor, scales: Tensor, expected_codes: Tensor, expected_scales: Tensor) -> None:
    """Scales alike and codes alike, but for values on the edge of two codes that float32 rounding moves over it."""
    assert torch.equal(scales, expected_scales)
    difference = codes.float() - expected_codes.float()
    assert difference.ne(0).float().mean() <= 0.002
    assert (difference.abs() <= 0.13 * expected_codes.float().abs() + 2**-9).all()


def test_an_e4m3_cache_takes_one_power_of_two_a_token_and_head(device):
    case = attention_case(9, 4, 2, 64, torch.float32, device)
    slots = torch.tensor([8, 3, 1, -1, 0, 12, 9, 4, 5], device=device)
    caches = [[torch.full((13, 2, 64), 77, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(2)]
    scales = [[torch.full((13, 2), float("nan"), device=device) for _ in range(2)] for _ in range(2)]
    for module, mine, its_scales in zip((norm_rotary, reference), caches, scales, strict=True):
        module.norm_rotary_write(*case, EPS, slots, *(cache.view(torch.float8_e4m3fn) for cache in mine), *its_scales)
    used = slots[slots >= 0].long()
    unused = torch.ones(13, dtype=torch.bool, device=device)
    unused[used] = False
    for cache, scale, expected, expected_scale in zip(caches[0], scales[0], caches[1], scales[1], strict=True):
        quantised_agree(
            cache[used].view(torch.float8_e4m3fn), scale[used], expected[used].view(torch.float8_e4m3fn), expected_scale[used]
        )
        assert (cache[unused] == 77).all() and scale[unused].isnan().all()


def index_case(num_tokens: int, heads: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Projections with their gates, keys, weights, tables."""
    projected = draw(num_tokens, heads * (width + 1), seed=5, dtype=dtype, device=device) * 2
    key = draw(num_tokens, width, seed=6, dtype=dtype, device=device) + 1
    weights = [draw(width, seed=seed, dtype=dtype, device=device) for seed in (7, 8, 9)]
    return [projected, key, *weights, *tables(num_tokens, width, device)]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("num_tokens", "heads", "width"), [(1, 16, 64), (19, 3, 32), (5, 1, 16), (9, 4, 128)])
def test_the_indexers_view_equals_the_plain_steps(device, num_tokens, heads, width, dtype):
    case = index_case(num_tokens, heads, width, dtype, device)
    result = norm_rotary.index_norm_rotary(*case, EPS)
    for tensor, expected in zip(result, reference.index_norm_rotary(*case, EPS), strict=True):
        close(tensor, expected)


def test_the_twin_is_what_the_models_indexer_computes():
    config = KeyeConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, vocab_size=8, rope_theta=1e6, mrope_section=(8, 12, 12),
        indexer=IndexerConfig(num_heads=4, head_dim=32, top_k=4), vision=None,
    )  # fmt: skip
    indexer = Indexer(config).to(torch.bfloat16)
    with torch.no_grad():
        for seed, parameter in enumerate(indexer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
        hidden = draw(13, 48, seed=20, dtype=torch.bfloat16)
        cos, sin = tables(13, 32, "cpu")
        projected, key = indexer.q_proj(hidden), indexer.k_proj(hidden)
        expected = indexer(projected, key, cos, sin)
        weights = (indexer.q_norm.weight, indexer.k_norm.weight, indexer.k_norm.bias)
        query, gates, key = reference.index_norm_rotary(projected, key, *weights, cos, sin, EPS)
    assert torch.equal(query, expected.query_TJI)
    assert torch.equal(gates, expected.gates_TJ) and torch.equal(key, expected.key_TI)


def test_index_keys_go_to_their_slots(device):
    case = index_case(6, 4, 32, torch.float32, device)
    slots = torch.tensor([17, 3, -1, 0, 22, 9], device=device)
    (mine,), (twin,) = filled_caches((23, 32), torch.float32, device, 1)
    result = norm_rotary.index_norm_rotary_write(*case, EPS, slots, mine)
    for tensor, expected in zip(result, reference.index_norm_rotary_write(*case, EPS, slots, twin), strict=True):
        close(tensor, expected)
    assert mine.isnan().sum() == (23 - 5) * 32
    torch.testing.assert_close(mine, twin, atol=2e-6, rtol=2e-5, equal_nan=True)


def test_in_e4m3_the_queries_scales_go_into_the_gates(device):
    case = index_case(10, 4, 64, torch.float32, device)
    slots = torch.tensor([8, 3, 1, -1, 0, 12, 9, 4, 5, 6], device=device)
    caches = [torch.full((13, 64), 77, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.full((13,), float("nan"), device=device) for _ in range(2)]
    results = [
        module.index_norm_rotary_write(*case, EPS, slots, cache.view(torch.float8_e4m3fn), scale)
        for module, cache, scale in zip((norm_rotary, reference), caches, scales, strict=True)
    ]
    assert torch.equal(results[0][1], results[1][1])
    gates = reference.index_norm_rotary(*case, EPS)[1]
    quantised_agree(results[0][0], results[0][1] / gates, results[1][0], results[1][1] / gates)
    used = slots[slots >= 0]
    mine, twin = (cache[used].view(torch.float8_e4m3fn) for cache in caches)
    quantised_agree(mine, scales[0][used], twin, scales[1][used])
    assert (caches[0] == 77).all(dim=1).sum() == 13 - 9 == scales[0].isnan().sum()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("width", [1, 48, 2048])
def test_rms_norms_equal_their_twins(device, width, dtype):
    x, y = draw(2, 3, width, seed=0, dtype=dtype, device=device), draw(2, 3, width, seed=1, dtype=dtype, device=device)
    weight = draw(width, seed=2, dtype=dtype, device=device)
    close(norm_rotary.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    for tensor, expected in zip(
        norm_rotary.add_rms_norm(x, y, weight, EPS), reference.add_rms_norm(x, y, weight, EPS), strict=True
    ):
        close(tensor, expected)


def test_repeated_runs_have_equal_bits(device):
    case = index_case(21, 16, 64, torch.float32, device)
    first = norm_rotary.index_norm_rotary(*case, EPS)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, norm_rotary.index_norm_rotary(*case, EPS), strict=True))


def test_no_tokens_give_no_rows(device):
    query, key, _, *rest = attention_case(0, 4, 2, 32, torch.float32, device)
    assert norm_rotary.norm_rotary(query, key, *rest, EPS)[0].shape == (0, 4, 32)
    assert norm_rotary.index_norm_rotary(*index_case(0, 4, 32, torch.float32, device), EPS)[2].shape == (0, 32)


def test_what_is_not_served_is_refused_in_one_sentence(device):
    query, key, value, *rest = attention_case(3, 4, 2, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"all tensors alike, got \['torch.float16', 'torch.float32'\]"):
        norm_rotary.norm_rotary(query, key.half(), *rest, EPS)
    with pytest.raises(ValueError, match="heads of 16, 32, 64, 128, 256 numbers, got 48"):
        norm_rotary.index_norm_rotary(*index_case(3, 4, 48, torch.float32, device), EPS)
    slots = torch.arange(3, device=device)
    caches = filled_caches((3, 2, 32), torch.float16, device, 2)[0]
    with pytest.raises(ValueError, match=r"writes torch\.float32 here, got caches of"):
        norm_rotary.norm_rotary_write(query, key, value, *rest, EPS, slots, *caches)
    projected, *others = index_case(3, 4, 32, torch.float32, device)
    with pytest.raises(ValueError, match="no whole heads of 32 and a gate"):
        norm_rotary.index_norm_rotary(projected[:, :-1], *others, EPS)
