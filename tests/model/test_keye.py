"""The whole network: pictures one by one or together, what trains what, and the recorded path through `PlainPast`."""

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.inputs.patches import Patches
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from tests.model.naive_keye import encode_picture, lay_out, make_config, make_weights


def build(**changes) -> tuple[KeyeModel, dict, dict[str, torch.Tensor]]:
    raw = make_config(**changes)
    weights = make_weights(raw)
    model = KeyeModel(KeyeConfig.from_dict(raw))
    model.load_state_dict({name: tensor for name, tensor in weights.items() if "packing" not in name}, strict=True)
    return model, raw, weights


def make_patches(*sizes: tuple[int, int]) -> Patches:
    pixels = torch.rand(sum(h * w for h, w in sizes), 3, 14, 14, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Patches(pixels, torch.tensor([[1, h, w] for h, w in sizes]))


def test_pictures_of_mixed_sizes_equal_the_naive_tower_in_any_slices():
    model, raw, weights = build()
    patches = make_patches((4, 6), (4, 6), (2, 2), (4, 6), (6, 4), (10, 2))
    with torch.inference_mode():
        together = model.encode_patches(patches)
        sliced = torch.cat([model.encode_patches(patches.slice_pictures(a, b)) for a, b in ((0, 1), (1, 4), (4, 6))])
        start, alone = 0, []
        for _, height, width in patches.grid_thw.tolist():
            pixels = patches.pixels[start : start + height * width]
            alone.append(encode_picture(raw, weights, pixels, height, width))
            start += height * width
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, sliced, rtol=1e-4, atol=1e-5)


def test_the_indexer_gets_no_gradient_from_logits_and_the_trunk_none_from_the_indexer():
    model, raw, _ = build()
    ids, positions, _ = lay_out(raw, [("text", 4), ("image", 4, 4), ("text", 12)])
    vectors = model.encode_patches(make_patches((4, 4)))
    past = PlainPast(raw["sa_config"]["topk"])
    model.logits(model(model.embed(ids, vectors, None), positions, past)).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        is_trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        # k projections' biases shift all scores of a row alike, and a softmax does not see that
        if not name.endswith("k_proj.bias"):
            assert is_trained == ("sa_indexer" not in name), name
    layer = model.model.layers[0]
    hidden = torch.randn(5, raw["hidden_size"], requires_grad=True)
    tables = [torch.ones(5, raw["head_dim"]), torch.zeros(5, raw["head_dim"])] * 2
    from openkeye.model.attention import RotaryTables

    index = layer.self_attn.project(hidden, RotaryTables(*tables), True)[3]
    inputs = [hidden, layer.self_attn.sa_indexer.q_proj.weight]
    gradients = torch.autograd.grad(
        index.query_TJI.sum() + index.key_TI.sum() + index.gates_TJ.sum(), inputs, allow_unused=True
    )
    assert gradients[0] is None and gradients[1].abs().sum() > 0


def test_dense_and_sparse_agree_up_to_top_k_tokens_and_differ_beyond():
    model, raw, _ = build()
    ids, positions, _ = lay_out(raw, [("text", 30)])
    embeds = model.embed(ids, None, None)
    with torch.inference_mode():
        dense = model(embeds, positions, PlainPast(8, "dense"))
        past = PlainPast(8)
        sparse = model(embeds, positions, past)
    torch.testing.assert_close(sparse[:8], dense[:8], rtol=1e-4, atol=1e-4)
    assert (sparse[8:] - dense[8:]).abs().max() > 0.01
    assert all(past.selected[number].shape == (30, 8) for number in range(raw["num_hidden_layers"]))


def test_embed_puts_vectors_in_order_and_refuses_a_wrong_count():
    model, raw, _ = build()
    ids, _, _ = lay_out(raw, [("image", 2, 4), ("text", 3), ("video", 2, 2), ("image", 2, 2)])
    images, videos = torch.randn(3, raw["hidden_size"]), torch.randn(1, raw["hidden_size"])
    embeds = model.embed(ids, images, videos)
    torch.testing.assert_close(embeds[[0, 1, 6]], images)
    torch.testing.assert_close(embeds[[5]], videos)
    torch.testing.assert_close(embeds[2:5], model.model.embed_tokens(ids[2:5]))
    with pytest.raises(InputError, match="3 pads of token 60 for 2 vectors"):
        model.embed(ids, images[:2], videos)


def test_bf16_weights_give_bf16_activations_near_the_fp32_ones():
    model, raw, _ = build()
    ids, positions, _ = lay_out(raw, [("text", 8)])
    with torch.inference_mode():
        exact = model.logits(model(model.embed(ids, None, None), positions, PlainPast(8)))
        narrow = model.bfloat16()
        hidden = narrow(narrow.embed(ids, None, None), positions, PlainPast(8))
        logits = narrow.logits(hidden)
    assert hidden.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.1
