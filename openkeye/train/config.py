"""Typed settings of a run: sources of samples, and stages that each say what trains, on what, how fast."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from openkeye.data.config import Share, SourceConfig

PARTS = ("vision", "projector", "decoder", "indexer")


@dataclass(frozen=True)
class StageConfig:
    """One stretch of a run."""

    name: str
    num_steps: int
    context: int
    # tokens of the longest document
    mixture: tuple[Share, ...]
    tokens_per_pack: int = 0
    # 0: `context`
    packs_per_step: int = 1
    # over all ranks
    trains: tuple[str, ...] = ("vision", "projector", "decoder")
    # of PARTS
    attention: str = "dense"
    # "dense" or "sparse"
    indexer_target: str = "none"
    # "none": the indexer is left alone; "dense": attention's distribution over all that a token sees (warm-up);
    # "selected": the selected softmaxes summed over heads; "selected_dense": the dense distribution cut to the selection
    indexer_weight: float = 1.0
    # lambda of the KL (report, sparse adaptation)
    emulates_e4m3: bool = False
    # the indexer's queries and keys rounded as answering in e4m3 rounds them
    rates: Mapping[str, float] = field(default_factory=dict)
    # peak learning rate of each part that trains; a part without one takes `rate`
    rate: float = 1e-4
    rate_end_share: float = 0.1
    # of the peak, at the stage's last step (cosine)
    num_warmup_steps: int = 0
    answer_weight: float = 1.0
    # of the next-token loss; 0 where only the indexer learns
    balance_weight: float = 0.0
    # of the experts' load-balance loss
    max_clip_seconds: float | None = None
    video_tokens: int | None = None
    stop_at_recall: float | None = None
    # ends the stage early once the indexer's recall of attention's top k, averaged over layers, has reached it


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    model_dir: str
    # where it begins: weights, tokenizer, template, processor
    run_dir: str
    # checkpoints, logs and curves
    out_dir: str
    # the finished model in the published layout
    sources: Mapping[str, SourceConfig]
    stages: tuple[StageConfig, ...]
    seed: int = 0
    fresh: tuple[str, ...] = ()
    # of PARTS: initialised anew instead of loaded
    evaluates: tuple[str, ...] = ()
    # names in `sources` that are held out: `openkeye train` answers them before the first step and after the last
    optimizer: str = "adamw"
    # or "muon": matrices of the trunk by orthogonalised momentum, the rest by AdamW
    weight_decay: float = 0.05
    clip: float = 1.0
    compute_dtype: str = "auto"
    # "float32", "bfloat16", or "auto": bfloat16 on a GPU
    num_shards: int = 0
    # ranks that share one copy of the weights (FSDP2), the rest replicate; 0: all of them
    recomputes: bool = False
    # activations of each layer are computed again in the backward pass
    compiles: bool = False
    # the regions between attentions, by torch.compile
    num_workers: int = 2
    max_bad_share: float = 0.05
    save_every_seconds: float = 300.0
    log_every: int = 10
    metrics_every: int = 50
    # steps between measurements of the indexer's recall, mass and unique keys
    has_tensorboard: bool = True
