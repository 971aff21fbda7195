"""Keys out of their pages, against the plain twin; what nobody wrote is never read."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.paged_reads import read_pages
from tests.kernels.test_dispatch import draw

PAGE = 16


def paged(num_keys: int, is_e4m3: bool, device: str, width: int = 32) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Cache, scales, page table of a sequence in disorder, and the sequence itself in float32."""
    num_pages = -(-num_keys // PAGE)
    table = torch.randperm(num_pages + 2, generator=torch.Generator().manual_seed(0))[:num_pages].to(device)
    slots = (table[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[:num_keys]
    keys = 3.0 * draw(num_keys, 2, width, device=device)
    cache = torch.full((PAGE * (num_pages + 2), 2, width), torch.nan, device=device)
    if not is_e4m3:
        cache[slots] = keys
        return cache, None, table.int(), keys
    codes, scales = reference.quantize_vectors(keys)
    cache, all_scales = cache.to(torch.float8_e4m3fn), torch.full(cache.shape[:2], torch.nan, device=device)
    cache.view(torch.uint8)[slots] = codes.view(torch.uint8)
    all_scales[slots] = scales
    return cache, all_scales, table.int(), codes.float() * scales[..., None]


@pytest.mark.parametrize("num_keys", [1, 16, 75])
@pytest.mark.parametrize("is_e4m3", [False, True])
@pytest.mark.parametrize("serve", [read_pages, reference.read_pages])
def test_pages_come_in_order(serve, num_keys, is_e4m3, device):
    cache, scales, table, expected = paged(num_keys, is_e4m3, device)
    assert torch.equal(serve(cache, table, num_keys, PAGE, torch.float32, scales), expected)


@pytest.mark.parametrize("serve", [read_pages, reference.read_pages])
def test_e4m3_comes_in_the_dtype_asked_for(serve, device):
    cache, scales, table, expected = paged(20, True, device)
    assert torch.equal(serve(cache, table, 20, PAGE, torch.bfloat16, scales), expected.to(torch.bfloat16))


def test_nothing_to_read_and_layers_of_a_larger_cache(device):
    cache, _, table, expected = paged(20, False, device)
    assert read_pages(cache, table, 0, PAGE, torch.float32).shape == (0, 2, 32)
    layers = torch.stack([torch.zeros_like(cache), cache])
    assert torch.equal(read_pages(layers[1], table, 20, PAGE, torch.float32), expected)


def test_what_does_not_fit_is_refused_in_one_sentence(device):
    cache, scales, table, _ = paged(20, True, device)
    with pytest.raises(ValueError, match=r"read_pages gives torch.float32 of caches in it, or in e4m3 with scales"):
        read_pages(cache, table, 20, PAGE, torch.float32)
    with pytest.raises(ValueError, match=r"read_pages got 2 pages of 16 in torch.int32 for 40 keys"):
        read_pages(cache, table, 40, PAGE, torch.float32, scales)
