"""Against code that nobody here wrote: transformers' Qwen3-MoE and SigLIP with the same weights."""

import pytest
import torch

from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.model.vision import VisionLayer
from tests.model.naive_keye import make_config, make_weights

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_text_logits_equal_qwen3_moe_where_everything_is_selected(attention, is_tied):
    raw = make_config(vision_config=None, tie_word_embeddings=is_tied, sa_config={"topk": 64})
    config, weights = KeyeConfig.from_dict(raw), make_weights(raw)
    model = KeyeModel(config)
    model.load_state_dict(weights)
    twin = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **{
                key: value
                for key, value in raw.items()
                if key not in ("rope_scaling", "sa_config", "model_type", "vision_config")
            },
            rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
        )
    )
    # transformers stores experts output-major
    theirs = {
        name: tensor.mT if ".experts." in name else tensor for name, tensor in weights.items() if "sa_indexer" not in name
    }
    if is_tied:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    twin.load_state_dict(theirs, strict=True)
    ids = torch.randint(0, 60, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        hidden = model(model.embed(ids, None, None), torch.arange(50).expand(3, -1), PlainPast(64, attention))
        expected = twin.eval()(ids[None]).logits[0]
        logits = model.logits(hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1, "a flat output would prove nothing"


def test_vision_layer_equals_siglip_where_nothing_is_rotated():
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    settings = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 72, "num_hidden_layers": 1}
    twin = SiglipEncoderLayer(transformers.SiglipVisionConfig(**settings, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    config = KeyeConfig.from_dict(make_config(vision_config=settings))
    assert config.vision is not None
    layer = VisionLayer(config.vision)
    layer.load_state_dict(twin.state_dict(), strict=True)
    pictures = torch.randn(3, 20, 48, generator=generator)
    # at angle zero rotation is the identity: SigLIP has none
    with torch.inference_mode():
        ours = layer(pictures, torch.ones(20, 12), torch.zeros(20, 12))
        expected = twin(pictures, None)
    torch.testing.assert_close(ours, expected[0] if isinstance(expected, tuple) else expected, rtol=1e-4, atol=1e-4)
