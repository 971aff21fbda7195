"""A text checkpoint of another family becomes one of the published layout, with a fresh lightning indexer in every layer.

Weights are copied unchanged, one output file at a time: no more than that is ever in memory. Families whose layers compute
what ours compute are taken; whatever a configuration asks for beyond that is refused, because it would be dropped in silence.

Letters: D hidden width, E experts, F expert width.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openkeye.common.checks import InputError, writing_to
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.fresh_indexer import fresh_indexers
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import INDEX_FILE, SHARD_BYTES, SINGLE_FILE, open_weights, weight_files

FAMILIES = ("llama", "mistral", "qwen3", "qwen3_moe")
# `model_type`; SmolLM2 calls itself llama
WITH_HEAD_NORMS = ("qwen3", "qwen3_moe")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# for a checkpoint without a chat template: a model that was never taught to chat at least sees who speaks
FUSED = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")


@dataclass(frozen=True)
class Planned:
    """A tensor of the new checkpoint, made when its file is written."""

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


class SourceWeights:
    """The tensors of a folder's safetensors files by name, read when asked for.

    Raises:
        InputError: a file is missing or unreadable, or a tensor is there twice or in a format that has lost precision.
    """

    def __init__(self, folder: Path) -> None:
        self.path_of: dict[str, Path] = {}
        self.shape_of: dict[str, tuple[int, ...]] = {}
        self.item_bytes_of: dict[str, int] = {}
        for path, promised in weight_files(folder):
            with open_weights(path) as file:
                names = set(file.keys())
                if promised - names:
                    raise InputError(f"{path} lacks {', '.join(sorted(promised - names))}, which {INDEX_FILE} names")
                for name in names:
                    if name in self.path_of:
                        raise InputError(f"{folder}: {name} is in {self.path_of[name].name} and in {path.name}")
                    header = file.get_slice(name)
                    if header.get_dtype() not in ITEM_BYTES:
                        raise InputError(
                            f"{path}: {name} is {header.get_dtype()}; give the checkpoint in bfloat16, not quantised"
                        )
                    self.path_of[name], self.shape_of[name] = path, tuple(header.get_shape())
                    self.item_bytes_of[name] = ITEM_BYTES[header.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with open_weights(self.path_of[name]) as file:
            return file.get_tensor(name)


def convert_checkpoint(
    source_dir: str | Path, target_dir: str | Path, indexer: IndexerConfig, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> KeyeConfig:
    """Write the checkpoint of `source_dir` as an OpenKeye text model; the new folder appears whole or not at all.

    Args:
        source_dir: a Hugging Face folder of one of `FAMILIES`: config.json, safetensors (one file or shards), tokenizer.json.
        target_dir: where there is nothing yet, or an empty folder.
        indexer: heads, width and top-k of the indexer, whose fresh weights `seed` decides (`fresh_indexer`).
        shard_bytes: of a weight file at most.

    Raises:
        InputError: the source is not such a folder, asks for something this network has not, or the target is in use.
    """
    source, target = Path(source_dir).expanduser(), Path(target_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty: give a new folder")
    raw = _read_json(source / "config.json")
    settings = keye_settings(raw, indexer, _read_json(source / "generation_config.json", is_needed=False))
    config = KeyeConfig.from_dict(settings)
    if not (source / "tokenizer.json").is_file():
        raise InputError(
            f"{source} has no tokenizer.json: load the tokenizer with transformers' AutoTokenizer and save_pretrained it there"
        )
    planned = plan_tensors(SourceWeights(source), config, source, seed)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write_weights(planned, scratch, shard_bytes)
            _write_others(source, scratch, settings)
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return config


def keye_settings(raw: dict[str, Any], indexer: IndexerConfig, generation: dict[str, Any]) -> dict[str, Any]:
    """The published layout's config.json of another family's one.

    Raises:
        InputError: another family, or something that this network has not: biases, sliding windows, partial rotary, ...
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"config.json: model_type is {family!r}; what can be converted is {', '.join(FAMILIES)}")
    _refuse_unsupported(raw)
    if "num_local_experts" in raw:
        # what transformers 5 writes
        raw = {"num_experts": raw["num_local_experts"], **raw}
    rope: dict[str, Any] = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = raw.get("rope_theta") or rope.pop("rope_theta", None) or 10000.0
    rope = {key: value for key, value in rope.items() if key not in ("rope_theta", "type", "partial_rotary_factor")} | {
        "rope_type": rope.get("rope_type", rope.get("type", "default"))
    }
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    of_mlp = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    needed = (*needed, *(of_mlp if family == "qwen3_moe" else ("intermediate_size",)))
    missing = [key for key in needed if raw.get(key) is None]
    eos = raw.get("eos_token_id", generation.get("eos_token_id"))
    if eos is None:
        missing.append("eos_token_id")
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    passed = ("attention_bias", "mlp_bias", "hidden_act", "mlp_only_layers", "decoder_sparse_step")
    return {
        "model_type": "KeyeVL2",
        "converted_from": family,
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        **{key: raw[key] for key in needed},
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "head_dim": head_dim,
        "use_qk_norm": family in WITH_HEAD_NORMS,
        "norm_topk_prob": bool(raw.get("norm_topk_prob", False)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": {**rope, "mrope_section": list(rotary_sections(head_dim, indexer.head_dim))},
        "sa_config": {
            "indexer_num_heads": indexer.num_heads,
            "indexer_head_dim": indexer.head_dim,
            "indexer_num_kv_heads": 1,
            "topk": indexer.top_k,
        },
        "eos_token_id": eos,
        **{key: raw[key] for key in ("bos_token_id", *passed) if raw.get(key) is not None},
    }


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Raises InputError for what no later check would see."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "mistral" and "sliding_window" not in raw:
        window = 4096
        # what the family takes where the file is silent
    is_sliding = window is not None and (family == "mistral" or bool(raw.get("use_sliding_window")))
    if is_sliding and window < raw.get("max_position_embeddings", math.inf):
        raise InputError(f"config.json: sliding_window is {window}; attention over a window is not supported")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise InputError("config.json: layer_types names other layers than full_attention, which are not supported")
    share = raw.get("partial_rotary_factor", (raw.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
    if share not in (None, 1, 1.0):
        raise InputError(f"config.json: partial_rotary_factor is {share}; only heads turned whole are supported")


def rotary_sections(head_dim: int, index_dim: int) -> tuple[int, int, int]:
    """Rotary pairs for time, height and width.

    Text has the same position on all three axes, so that any split computes the same. The published proportions 2 : 3 : 3 are
    taken where they come out whole for heads and indexer, so that pictures can be taught later; else all pairs are time's.
    """
    half = head_dim // 2
    sections = (half // 4, 3 * half // 8, 3 * half // 8)
    if half % 8 or any(section * index_dim % head_dim for section in sections):
        return half, 0, 0
    return sections


def plan_tensors(weights: SourceWeights, config: KeyeConfig, source: Path, seed: int) -> list[Planned]:
    """Every tensor of the new checkpoint, in the order of the network.

    Raises:
        InputError: names every tensor that is unknown, missing or misshapen.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in KeyeModel(config).state_dict().items()}
    copied = {name: shape for name, shape in wanted.items() if ".sa_indexer." not in name}
    recipes = {name: _recipe(name, shape, config, weights) for name, shape in copied.items()}
    expected = {part: shape for parts, _ in recipes.values() for part, shape in parts.items()}
    problems = [f"missing {part}" for part in expected if part not in weights.path_of]
    for part, shape in expected.items():
        if (its_shape := weights.shape_of.get(part, shape)) != shape:
            problems.append(f"{part} is {list(its_shape)} instead of {list(shape)}")
    unknown = {name for name in weights.path_of.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in unknown:
        unknown.remove("lm_head.weight")
        if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
            problems.append("lm_head.weight is unlike the embeddings, though tie_word_embeddings is true")
    problems += [f"unknown {name}" for name in sorted(unknown)]
    if problems:
        raise InputError(f"{source}: the weights do not fit config.json ({'; '.join(problems)}); use files of one checkpoint")
    gains = [weights.read(f"model.layers.{number}.input_layernorm.weight") for number in range(config.num_hidden_layers)]
    fresh = fresh_indexers(config, gains, seed)
    planned = []
    for name, shape in wanted.items():
        if name in fresh:
            planned.append(Planned(name, fresh[name].nbytes, partial(fresh.__getitem__, name)))
        else:
            parts, make = recipes[name]
            planned.append(Planned(name, math.prod(shape) * weights.item_bytes_of[next(iter(parts))], make))
    return planned


def _recipe(
    name: str, shape: tuple[int, ...], config: KeyeConfig, weights: SourceWeights
) -> tuple[dict[str, tuple[int, ...]], Callable[[], Tensor]]:
    """The source's tensors that one of ours is made of, with their shapes, and how it is made."""
    if not FUSED.fullmatch(name):
        return {name: shape}, lambda: weights.read(name)
    if name in weights.path_of:
        # transformers 5 keeps a layer's experts output-major: [E, 2 F, D] and [E, D, F].
        return {name: (shape[0], shape[2], shape[1])}, lambda: weights.read(name).transpose(1, 2).contiguous()
    prefix, _, projection = name.rpartition(".")
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
    names = [[f"{prefix}.{expert}.{kind}.weight" for kind in kinds] for expert in range(config.num_experts)]

    def stack() -> Tensor:
        return torch.stack([torch.cat([weights.read(part) for part in parts]).t() for parts in names])

    its_shape = (shape[2] // len(kinds), shape[1])
    return {part: its_shape for parts in names for part in parts}, stack


def _read_json(path: Path, is_needed: bool = True) -> dict[str, Any]:
    """A JSON object; {} where a file that may be absent is."""
    if not path.is_file():
        if is_needed:
            raise InputError(f"{path} does not exist: give a checkpoint folder")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore the file from its source") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: restore the file from its source")
    return content


def _write_weights(planned: list[Planned], folder: Path, shard_bytes: int) -> None:
    """One file, or shards with an index; a shard's tensors are made, written and let go."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if size + tensor.num_bytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file({tensor.name: tensor.make().contiguous() for tensor in shard}, folder / name, metadata={"format": "pt"})
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in planned)}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")


def _write_others(source: Path, folder: Path, settings: dict[str, Any]) -> None:
    """config.json, tokenizer and template, and how answers end."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer = _read_json(source / "tokenizer_config.json", is_needed=False)
    if not tokenizer.get("chat_template") and not (source / "chat_template.jinja").is_file():
        tokenizer["chat_template"] = PLAIN_TEMPLATE
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    if not (source / "generation_config.json").is_file():
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": settings["eos_token_id"]}, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    for path in folder.glob("*.safetensors"):
        # The library writes them for their owner's eyes alone.
        shutil.copymode(folder / "config.json", path)
