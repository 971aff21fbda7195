"""A checkpoint folder with everything but weights: a byte-level tokenizer and the published field names."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
]
IMAGE_PAD, VIDEO_PAD, FRAME = 5, 6, 7


def write_checkpoint(folder: Path, **preprocessor: object) -> Path:
    """112x112 pictures of 16 tokens, a budget of 640 frames, as the bundled model has them; fields may be changed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["when does the red circle appear", "system user assistant"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "max_position_embeddings": 32768,
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
    }
    settings = {
        "patch_size": 14,
        "merge_size": 2,
        "min_pixels": 16 * 784,
        "max_pixels": 16 * 784,
        "video": {"min_tokens_per_frame": 16, "max_tokens_per_frame": 16, "total_tokens": 10240},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **preprocessor}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder
