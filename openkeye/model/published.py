"""Configurations of published checkpoints, so that `openkeye info` can describe them without their files."""

from openkeye.common.checks import InputError
from openkeye.model.config import KeyeConfig

KEYE_VL_2_0_30B_A3B = {
    "model_type": "KeyeVL2",
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 262144,
    "rope_theta": 10000000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "sa_config": {"indexer_num_heads": 16, "indexer_head_dim": 64, "indexer_num_kv_heads": 1, "topk": 2048},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
        "patch_size": 14,
        "num_channels": 3,
        "spatial_merge_size": 2,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
}

PUBLISHED = {"keye-vl-2.0-30b-a3b": KEYE_VL_2_0_30B_A3B}
PACKING_PARAMETERS = 32768 * 1152
# every published checkpoint carries this position table, which no computation reads


def published_config(name: str) -> KeyeConfig:
    """The configuration of a published checkpoint.

    Raises:
        InputError: no checkpoint of that name is known here.
    """
    key = name.lower().removeprefix("kwai-keye/")
    if key not in PUBLISHED:
        raise InputError(f"{name}: no such published model; known are {', '.join(sorted(PUBLISHED))}")
    return KeyeConfig.from_dict(PUBLISHED[key])
