"""`config.json` of the published layout as typed records; keys that we do not use are kept and written back."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError

REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip
OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# required unless the layers have one dense MLP each, which is then `intermediate_size` wide
OPTIONAL = (
    "max_position_embeddings", "rms_norm_eps", "norm_topk_prob", "tie_word_embeddings", "image_token_id", "video_token_id",
    "dtype",
)  # fmt: skip


def _check_counts(record: object, where: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {name} is {value!r}, expected a whole number of at least 1")


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the patch grid (`vision_config`)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 384
    patch_size: int = 14
    num_channels: int = 3
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        _check_counts(
            self,
            "vision_config",
            (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
                "num_channels", "spatial_merge_size",
            ),
        )  # fmt: skip
        if self.image_size < self.patch_size:
            raise InputError(f"vision_config: image_size {self.image_size} is below patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise InputError(
                f"vision_config: hidden_size {self.hidden_size} over {self.num_attention_heads} heads must give a head width "
                "that is a multiple of 4 (two axes of rotated pairs)"
            )
        if self.hidden_act != "gelu_pytorch_tanh":
            raise InputError(f"vision_config: hidden_act is {self.hidden_act!r}, expected 'gelu_pytorch_tanh'")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def base_grid(self) -> int:
        """Side of the learned position table, in patches."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer (`sa_config`)."""

    num_heads: int = 4
    head_dim: int = 128
    top_k: int = 2048

    def __post_init__(self) -> None:
        _check_counts(self, "sa_config", ("num_heads", "head_dim", "top_k"))
        if self.head_dim & (self.head_dim - 1) or self.head_dim < 2:
            raise InputError(f"sa_config: indexer_head_dim {self.head_dim} must be a power of two (its Hadamard transform)")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of a context longer than the first training's (`rope_scaling` of type "llama3")."""

    factor: float
    # by which long waves are slowed down
    low_freq_factor: float
    high_freq_factor: float
    # waves longer than original / low are slowed, those shorter than original / high are kept, a ramp lies between
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise InputError(
                f"rope_scaling: factor {self.factor}, low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected a factor of at least 1 and 0 < low < high"
            )


@dataclass(frozen=True)
class KeyeConfig:
    """The whole network. Field names are the file's, where the file has one."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    indexer: IndexerConfig
    vision: VisionConfig | None
    num_experts: int = 0
    # 0: a dense MLP in every layer
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    intermediate_size: int = 0
    # of the dense MLP
    use_qk_norm: bool = True
    # an RMS norm of every head of queries and keys
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    eos_token_id: int = 151645
    dtype: str = "bfloat16"
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    # the file as read, so that saving writes back what we do not use

    def __post_init__(self) -> None:
        _check_counts(self, "config.json", (*REQUIRED, *(OF_EXPERTS if self.num_experts else ("intermediate_size",))))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                "key-value heads evenly"
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise InputError(
                f"config.json: mrope_section {list(self.mrope_section)} must sum to head_dim / 2 = {self.head_dim // 2}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
            )
        if any(section * self.indexer.head_dim % self.head_dim for section in self.mrope_section):
            raise InputError(
                f"sa_config: indexer_head_dim {self.indexer.head_dim} does not scale mrope_section {list(self.mrope_section)} "
                "to whole numbers"
            )

    @property
    def index_mrope_section(self) -> tuple[int, ...]:
        """The main sections scaled to the indexer's width (spec: indexer rotary over all its dimensions)."""
        return tuple(section * self.indexer.head_dim // self.head_dim for section in self.mrope_section)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "KeyeConfig":
        """Read the flat published layout.

        Raises:
            InputError: a key is missing or a value is not supported; the message lists all missing keys.
        """
        is_dense = raw.get("num_experts") == 0 or ("intermediate_size" in raw and not any(key in raw for key in OF_EXPERTS))
        required = (*REQUIRED, *(("intermediate_size",) if is_dense else OF_EXPERTS))
        missing = [key for key in required if key not in raw]
        theta: Any = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
        if theta is None:
            missing.append("rope_theta (or rope_parameters.rope_theta)")
        scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if "mrope_section" not in scaling:
            missing.append("rope_scaling.mrope_section")
        if missing:
            raise InputError(f"config.json lacks {', '.join(missing)}: give the configuration of a Keye-VL-2.0 model")
        _check_supported(raw)
        sparse = raw.get("sa_config") or {}
        vision = raw.get("vision_config")
        eos = raw.get("eos_token_id", 151645)
        optional = {key: raw[key] for key in OPTIONAL if key in raw}
        return cls(
            **{key: raw[key] for key in required},
            use_qk_norm=bool(raw.get("use_qk_norm", True)),
            rope_scaling=_rope_scaling_from_dict(scaling),
            rope_theta=float(theta),
            mrope_section=tuple(scaling["mrope_section"]),
            indexer=IndexerConfig(
                sparse.get("indexer_num_heads", 4), sparse.get("indexer_head_dim", 128), sparse.get("topk", 2048)
            ),
            vision=None if vision is None else _vision_from_dict(vision),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
            raw=raw,
            **optional,
        )

    @classmethod
    def load(cls, model_dir: str | Path) -> "KeyeConfig":
        """Read `config.json` of a model folder.

        Raises:
            InputError: the file is missing, is not JSON, or does not describe this architecture.
        """
        path = Path(model_dir) / "config.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: give a model folder in the published layout")
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON ({error}): restore the file from its source") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path} holds no JSON object: restore the file from its source")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The file as it was read, with those fields written over it that were changed since."""
        if self.raw and KeyeConfig.from_dict(self.raw) == self:
            return dict(self.raw)
        of_mlp = OF_EXPERTS if self.num_experts else ("num_experts", "intermediate_size")
        fields = {key: getattr(self, key) for key in (*REQUIRED, *of_mlp, *OPTIONAL, "rope_theta", "eos_token_id")}
        if not self.use_qk_norm or "use_qk_norm" in self.raw:
            fields["use_qk_norm"] = self.use_qk_norm
        scaling = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {"rope_type": "default"}
        indexer = {
            "indexer_num_heads": self.indexer.num_heads, "indexer_head_dim": self.indexer.head_dim, "topk": self.indexer.top_k,
        }  # fmt: skip
        written = {
            **self.raw,
            **fields,
            "rope_scaling": {**scaling, **_rope_scaling_to_dict(self.rope_scaling), "mrope_section": list(self.mrope_section)},
            "sa_config": {**(self.raw.get("sa_config") or {}), **indexer},
        }
        written.pop("vision_config", None)
        if self.vision is not None:
            written["vision_config"] = {**(self.raw.get("vision_config") or {}), **asdict(self.vision)}
        return written


def _check_supported(raw: dict[str, Any]) -> None:
    """Raises InputError for what this architecture has not and would compute wrongly in silence."""
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act is {raw['hidden_act']!r}, expected 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise InputError(f"config.json: {key} is true; this architecture has no such biases")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise InputError(
            "config.json: every layer must be a mixture of experts, or none (mlp_only_layers [], decoder_sparse_step 1)"
        )


def _rope_scaling_from_dict(raw: dict[str, Any]) -> RopeScaling | None:
    """`rope_scaling` (or `rope_parameters`) beside its sections."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "llama3":
        raise InputError(f"config.json: rope_scaling of type {kind!r} is not supported; expected 'default' or 'llama3'")
    names = tuple(RopeScaling.__dataclass_fields__)
    missing = [name for name in names if name not in raw]
    if missing:
        raise InputError(f"config.json: rope_scaling of type 'llama3' lacks {', '.join(missing)}")
    return RopeScaling(**{name: raw[name] for name in names})


def _rope_scaling_to_dict(scaling: RopeScaling | None) -> dict[str, Any]:
    return {} if scaling is None else {"rope_type": "llama3", **asdict(scaling)}


def _vision_from_dict(raw: dict[str, Any]) -> VisionConfig:
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    missing = [key for key in required if key not in raw]
    if missing:
        raise InputError(f"config.json: vision_config lacks {', '.join(missing)}")
    names = VisionConfig.__dataclass_fields__
    return VisionConfig(**{key: value for key, value in raw.items() if key in names})
