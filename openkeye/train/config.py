"""Typed settings of a run: sources of samples, and stages that each say what trains, on what, how fast."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from openkeye.common.checks import InputError, check_least, check_number, check_one_of
from openkeye.data.config import Share, SourceConfig

PARTS = ("vision", "projector", "decoder", "indexer")
ATTENTIONS = ("dense", "sparse")
INDEXER_TARGETS = ("none", "dense", "selected", "selected_dense")
OPTIMIZERS = ("adamw", "muon")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


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

    def __post_init__(self) -> None:
        """Raises InputError where a stage contradicts itself; what needs the model or the run is `refusals.check_run`'s."""
        for name, least in (("num_steps", 1), ("context", 2), ("packs_per_step", 1), ("num_warmup_steps", 0)):
            check_least(f"stage {self.name!r}", name, getattr(self, name), least)
        for name in ("rate", "indexer_weight", "answer_weight", "balance_weight"):
            check_number(f"stage {self.name!r}", name, getattr(self, name))
        check_one_of(f"stage {self.name!r}", "attention", self.attention, ATTENTIONS)
        check_one_of(f"stage {self.name!r}", "indexer_target", self.indexer_target, INDEXER_TARGETS)
        if self.tokens_per_pack and self.tokens_per_pack < self.context:
            raise self._wrong(
                f"tokens_per_pack {self.tokens_per_pack} is below context {self.context}; give at least {self.context}, or 0"
            )
        if not 0 <= self.rate_end_share <= 1:
            raise self._wrong(f"rate_end_share is {self.rate_end_share}; give a share from 0 to 1")
        if self.num_warmup_steps > self.num_steps:
            raise self._wrong(f"num_warmup_steps {self.num_warmup_steps} exceeds num_steps {self.num_steps}; warm up for fewer")
        if self.stop_at_recall is not None and not (0 < self.stop_at_recall <= 1 and "indexer" in self.trains):
            raise self._wrong("stop_at_recall needs a share above 0 up to 1 and a stage that trains the indexer")
        self._check_mixture()
        self._check_trains()

    def _wrong(self, text: str) -> InputError:
        return InputError(f"stage {self.name!r}: {text}")

    def _check_mixture(self) -> None:
        for when, progress in (("its beginning", 0.0), ("its end", 1.0)):
            if not sum(share.at(progress) for share in self.mixture) > 0:
                raise self._wrong(f"the mixture sums to zero at {when}; give at least one source a weight above 0")

    def _check_trains(self) -> None:
        """Every part that trains has a loss that reaches it, and every loss a part to teach."""
        if unknown := [part for part in self.trains if part not in PARTS]:
            raise self._wrong(f"trains names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
        if not self.trains:
            raise self._wrong(f"it trains nothing; name some of {', '.join(PARTS)} in trains")
        if idle := [part for part in self.rates if part not in self.trains]:
            raise self._wrong(f"rates has {', '.join(idle)}, which trains does not name; take them out, or let them train")
        for part, rate in self.rates.items():
            check_number(f"stage {self.name!r}", f"the rate of {part}", rate)
        others = [part for part in self.trains if part != "indexer"]
        if others and not self.answer_weight:
            raise self._wrong(f"{', '.join(others)} would learn nothing with answer_weight 0; raise it, or train the indexer")
        if self.balance_weight and "decoder" not in self.trains:
            raise self._wrong("balance_weight teaches routers, and the decoder does not train; set it to 0")
        if "indexer" in self.trains and (self.indexer_target == "none" or not self.indexer_weight):
            raise self._wrong(
                f"the indexer would learn nothing from indexer_target {self.indexer_target!r} with indexer_weight "
                f"{self.indexer_weight:g}; choose one of {', '.join(INDEXER_TARGETS[1:])} and a weight above 0"
            )
        if "indexer" not in self.trains and self.indexer_target != "none":
            raise self._wrong("indexer_target is set and the indexer does not train; add it to trains, or set it to 'none'")
        if self.indexer_target.startswith("selected") and self.attention != "sparse":
            raise self._wrong(f"indexer_target {self.indexer_target!r} needs attention 'sparse'; dense selects nothing")

    @property
    def pack_size(self) -> int:
        """The most tokens of a pack."""
        return self.tokens_per_pack or self.context


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
    optimizer: str = "adamw"
    # or "muon": matrices of the trunk by orthogonalised momentum, the rest by AdamW
    indexer_optimizer: str = "adamw"
    # or "muon": the same for the indexer's matrices, its gates apart; it learns several times faster then
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
    evaluates: tuple[str, ...] = ()
    # names in `sources` that are held out: `openkeye train` answers them before the first step and after the last

    def __post_init__(self) -> None:
        """Raises InputError where the run contradicts itself."""
        if not self.stages:
            raise InputError("the run has no stages; give at least one")
        if twice := [name for name, count in Counter(stage.name for stage in self.stages).items() if count > 1]:
            raise InputError(f"stages share the name {', '.join(twice)}; give each its own")
        for stage in self.stages:
            if unknown := [share.source for share in stage.mixture if share.source not in self.sources]:
                raise InputError(
                    f"stage {stage.name!r}: the mixture names {', '.join(unknown)}; "
                    f"sources has {', '.join(self.sources) or 'none'}: add it there"
                )
        if unknown := [part for part in self.fresh if part not in PARTS]:
            raise InputError(f"fresh names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
        check_one_of("run", "optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("run", "indexer_optimizer", self.indexer_optimizer, OPTIMIZERS)
        check_one_of("run", "compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        for name, least in (("num_shards", 0), ("num_workers", 0), ("log_every", 1), ("metrics_every", 1)):
            check_least("run", name, getattr(self, name), least)
        for name in ("weight_decay", "save_every_seconds", "max_bad_share"):
            check_number("run", name, getattr(self, name))
        if not self.clip > 0:
            raise InputError(f"run: clip is {self.clip}; give the largest gradient norm, above 0 (inf: no clipping)")

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages)
