"""`Processor`: what a checkpoint's files say about turning files and messages into tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.inputs.sampling import ImageLimits, VideoLimits, limits_from_config
from openkeye.inputs.template import DEFAULT_TEMPLATE, ChatTemplate
from openkeye.inputs.tokenizer import TextTokenizer

BUNDLED_MODEL = "openkeye-tiny"
BUNDLED_DIR = Path(__file__).parent.parent / "checkpoints" / BUNDLED_MODEL

DEFAULT_FRAME_TEXT = "<|frame|>{seconds:.1f}"
# The 1.5 form; the exact text of 2.0 is not public (spec: 4.4).
NO_TOKEN = -1
# the placeholders' id of a model that sees nothing


def resolve_model_dir(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: the bundled model's name, or a folder that holds a config.json."""
    if str(name_or_path) == BUNDLED_MODEL:
        return BUNDLED_DIR
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{name_or_path}: no such model folder; give {BUNDLED_MODEL} or a folder with config.json")
    if not (folder / "config.json").is_file():
        raise InputError(f"{name_or_path}: this folder has no config.json; give the folder that holds the checkpoint's files")
    return folder


@dataclass(frozen=True)
class Processor:
    """Tokenizer, template and limits of one checkpoint."""

    model_dir: Path
    tokenizer: TextTokenizer
    template: ChatTemplate
    image_limits: ImageLimits
    video_limits: VideoLimits
    frame_text: str
    # python format with one field, seconds
    patch_size: int
    merge_size: int
    image_token_id: int
    video_token_id: int
    max_tokens: int | None
    # context length; None where the checkpoint does not say
    is_text_only: bool = False
    # no vision_config: pictures and videos are refused

    @classmethod
    def load(cls, model_dir: str | Path) -> "Processor":
        """Read config.json, tokenizer.json, tokenizer_config.json and preprocessor_config.json of a folder or a known name.

        A text model (without vision_config) needs no preprocessor_config.json and no placeholders in its vocabulary.
        """
        folder = resolve_model_dir(model_dir)
        config = read_json(folder / "config.json")
        is_text_only, path = config.get("vision_config") is None, folder / "preprocessor_config.json"
        preprocessor = {} if is_text_only and not path.is_file() else read_json(path)
        _check_normalisation(folder, preprocessor)
        patch_size, merge_size = _patch_and_merge(config, preprocessor)
        image_limits, video_limits = limits_from_config(preprocessor, patch_size * merge_size)
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        return cls(
            model_dir=folder,
            tokenizer=tokenizer,
            template=_load_template(folder, tokenizer),
            image_limits=image_limits,
            video_limits=video_limits,
            frame_text=_load_frame_text(folder, preprocessor),
            patch_size=patch_size,
            merge_size=merge_size,
            image_token_id=_media_token_id(folder, config, "image_token_id", tokenizer, "<|image_pad|>"),
            video_token_id=_media_token_id(folder, config, "video_token_id", tokenizer, "<|video_pad|>"),
            max_tokens=config.get("max_position_embeddings"),
            is_text_only=is_text_only,
        )

    def special_id(self, token: str) -> int:
        """The id of a special token; InputError if this tokenizer has none of that text."""
        token_id = self.tokenizer.token_id(token)
        if token_id is None:
            raise InputError(f"{self.model_dir / 'tokenizer.json'}: no token {token!r}; use the tokenizer of this checkpoint")
        return token_id

    def encode_text(self, text: str) -> list[int]:
        """Ids of prose: special tokens in it are not parsed."""
        return self.tokenizer.encode_text(text)

    def encode_frame_text(self, seconds: float) -> list[int]:
        """Ids of the text that stands before a frame shown at `seconds`."""
        return self.tokenizer.encode_template(self.frame_text.format(seconds=seconds))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)


def load_limits(model_dir: str | Path) -> tuple[ImageLimits, VideoLimits]:
    """The limits of a checkpoint alone, without its tokenizer."""
    folder = resolve_model_dir(model_dir)
    preprocessor = read_json(folder / "preprocessor_config.json")
    patch_size, merge_size = _patch_and_merge(read_json(folder / "config.json"), preprocessor)
    return limits_from_config(preprocessor, patch_size * merge_size)


def _patch_and_merge(config: dict[str, Any], preprocessor: dict[str, Any]) -> tuple[int, int]:
    """Pixels a side of a patch, and patches a side of a merged token."""
    vision = config.get("vision_config") or {}
    patch_size = int(preprocessor.get("patch_size") or vision.get("patch_size") or 14)
    return patch_size, int(preprocessor.get("merge_size") or vision.get("spatial_merge_size") or 2)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; InputError naming the file otherwise."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; copy it from the checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it from the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object; copy it from the checkpoint again")
    return content


def _check_normalisation(folder: Path, preprocessor: dict[str, Any]) -> None:
    """Pixels enter the model as x / 127.5 - 1; a file that asks for anything else would be obeyed wrongly in silence."""
    for key in ("image_mean", "image_std"):
        value = preprocessor.get(key, 0.5)
        if any(number != 0.5 for number in (value if isinstance(value, list) else [value])):
            raise InputError(f"{folder / 'preprocessor_config.json'}: {key} is {value}, only 0.5 is supported; set it to 0.5")


def _load_template(folder: Path, tokenizer: TextTokenizer) -> ChatTemplate:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    source = config.get("chat_template") or DEFAULT_TEMPLATE
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(source, list):
        # The older layout: several named templates.
        source = {entry["name"]: entry["template"] for entry in source}.get("default", DEFAULT_TEMPLATE)
    names = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    return ChatTemplate(source, sorted(tokenizer.special_tokens), names)


def _token_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _load_frame_text(folder: Path, preprocessor: dict[str, Any]) -> str:
    """The template before each frame: `frame_text` of processor_config.json or preprocessor_config.json, else the 1.5 form."""
    path = folder / "processor_config.json"
    processor = read_json(path) if path.is_file() else {}
    frame_text = processor.get("frame_text") or preprocessor.get("frame_text") or DEFAULT_FRAME_TEXT
    try:
        frame_text.format(seconds=0.0)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: frame_text {frame_text!r} is not a format of seconds alone: {error!r}") from error
    return frame_text


def _media_token_id(folder: Path, config: dict[str, Any], key: str, tokenizer: TextTokenizer, token: str) -> int:
    """The placeholder's id, on which config and tokenizer must agree; a text model may have none."""
    token_id = tokenizer.token_id(token)
    if token_id is None and key not in config and config.get("vision_config") is None:
        return NO_TOKEN
    if token_id is None or config.get(key, token_id) != token_id:
        raise InputError(
            f"{folder}: {token} is {token_id} in tokenizer.json and {config.get(key)} in config.json; "
            "both must name the same id: use files of one checkpoint"
        )
    return token_id
