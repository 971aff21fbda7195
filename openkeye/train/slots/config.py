"""Typed settings of a training run: a list of stages and what they share."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageConfig:
    """One stretch of a run: which clips, which attention, what learns, how fast."""

    name: str
    num_steps: int
    frame_counts: tuple[int, ...]
    # clip lengths in frames; one is drawn for every step
    frame_weights: tuple[float, ...] = ()
    # how often each length is drawn; empty means equally often
    attention: str = "dense"
    # "dense" or "sparse"
    trains: str = "all"
    # "all" or "indexer"
    rate_start: float = 1.0
    rate_end: float = 1.0
    # share of the peak learning rates, linear in between
    num_warmup_steps: int = 0
    cell_weight_start: float = 0.0
    cell_weight_end: float = 0.0
    # the auxiliary loss that names colour and sprite of every cell
    hint_weight_start: float = 0.0
    hint_weight_end: float = 0.0
    # attention hints (`data/slots/hints.py`)
    num_indexer_rows: int = 0
    # rows of a batch on which the indexer's KL is taken, of prefixes and of slots each; 0 leaves the indexer alone
    indexer_learns_from: str = "visible"
    # "visible": attention's distribution over all that a row may see; "selected": over what the indexer chose
    answer_weight: float = 1.0
    # 0 in the indexer's warm-up, where only its KL is wanted

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.frame_counts or min(self.frame_counts) < 2:
            raise ValueError(f"stage {self.name!r}: needs at least one step and clips of at least 2 frames")
        if self.frame_weights and len(self.frame_weights) != len(self.frame_counts):
            raise ValueError(
                f"stage {self.name!r}: {len(self.frame_counts)} lengths but {len(self.frame_weights)} weights; give one each"
            )
        if self.attention not in ("dense", "sparse"):
            raise ValueError(f"stage {self.name!r}: attention is 'dense' or 'sparse', got {self.attention!r}")
        if self.trains not in ("all", "indexer"):
            raise ValueError(f"stage {self.name!r}: trains is 'all' or 'indexer', got {self.trains!r}")
        if self.indexer_learns_from not in ("visible", "selected"):
            raise ValueError(
                f"stage {self.name!r}: indexer_learns_from is 'visible' or 'selected', got {self.indexer_learns_from!r}"
            )
        if self.trains == "indexer" and not self.num_indexer_rows:
            raise ValueError(f"stage {self.name!r} trains nothing: the indexer learns only from its KL; set num_indexer_rows")
        if not self.num_indexer_rows and not self.answer_weight and not self.cell_weight_start:
            raise ValueError(
                f"stage {self.name!r} trains nothing: answer_weight, cell weights and num_indexer_rows are all zero"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model_dir: str
    # folder with config.json, tokenizer and processor files; weights are written there at the end
    stages: tuple[StageConfig, ...]
    seed: int = 0
    num_frames_per_step: int = 2048
    slot_length: int = 56
    muon_rate: float = 2e-3
    adamw_rate: float = 2e-3
    indexer_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    balance_weight: float = 0.01
    # load balance of the experts (Switch Transformer, eq. 4)
    task_weights: dict[str, float] = field(default_factory=dict)
    # by task name, 1.0 where a task is not named
    num_workers: int = 0
    log_every: int = 50
    save_every_seconds: float = 200.0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("TrainConfig needs at least one stage")
        longest = max(max(stage.frame_counts) for stage in self.stages)
        if longest > self.num_frames_per_step:
            raise ValueError(
                f"a clip of {longest} frames does not fit a step of {self.num_frames_per_step}: raise num_frames_per_step"
            )

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[StageConfig, int]:
        """The stage of a step and the step's number inside it."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage, step
            step -= stage.num_steps
        raise IndexError("step past the end of the run")
