"""Makes the files of the openkeye-tiny folder that are not weights: configuration, tokenizer, template, processor.

python -m recipes.tiny_files          # writes into openkeye/checkpoints/openkeye-tiny
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openkeye.frameforge.stream import make_training_clip
from recipes.tiny import CHECKPOINT

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
    "<|fast_video_pad|>",
]

# Turns without a system message: a small model should spend no tokens on what never changes.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(num_clips: int = 4000) -> Tokenizer:
    """A byte-level BPE over FrameForge's questions and answers; digits stand alone, any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for index in range(num_clips):
        for question in make_training_clip(seed=1, index=index, num_frames=24).questions:
            texts += [question.text, question.answer]
    trainer = trainers.BpeTrainer(
        vocab_size=672,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(token_id: dict[str, int]) -> dict:
    """`config.json` in the published layout, at a size that fits a laptop."""
    return {
        "model_type": "KeyeVL2",
        "architectures": ["KeyeVL2MoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": False,
        "intermediate_size": 768,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 672,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "sa_config": {"indexer_num_heads": 4, "indexer_head_dim": 32, "indexer_num_kv_heads": 1, "topk": 192},
        "image_token_id": token_id["<|image_pad|>"],
        "video_token_id": token_id["<|video_pad|>"],
        "fast_video_token_id": token_id["<|fast_video_pad|>"],
        "vision_start_token_id": token_id["<|vision_start|>"],
        "vision_end_token_id": token_id["<|vision_end|>"],
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|im_end|>"],
        "vision_config": {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "image_size": 112,
            "patch_size": 14,
            "num_channels": 3,
            "spatial_merge_size": 2,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def write(folder: Path = CHECKPOINT) -> None:
    """Write every file but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    token_id = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    files = {
        "config.json": model_config(token_id),
        "tokenizer_config.json": {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "generation_config.json": {
            "eos_token_id": [token_id["<|im_end|>"], token_id["<|endoftext|>"]],
            "pad_token_id": token_id["<|endoftext|>"],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "patch_size": 14,
            "merge_size": 2,
            "min_pixels": 16 * 784,
            "max_pixels": 16 * 784,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "frame_text": "<|frame|>{seconds:05.1f}",
            "video": {
                "fps": 2.0,
                "min_tokens_per_frame": 16,
                "max_tokens_per_frame": 16,
                "total_tokens": 10240,
                "min_frames": 2,
            },
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write()
