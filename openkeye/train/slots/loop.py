"""The heart of training: take a batch, compute the losses, step, log, save. Open this file first.

A run is a list of stages (`config.py`); it can stop after any step and resume, on this machine or another.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from openkeye.common.device import upload
from openkeye.common.log import JsonLines
from openkeye.data.slots.slot_batch import SlotBatch
from openkeye.inputs.patches import Patches
from openkeye.model.decoder import DecoderLayer
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.keye import KeyeModel
from openkeye.train.slots.checkpoint import load_state, prefixed, save_state, under
from openkeye.train.slots.config import StageConfig, TrainConfig
from openkeye.train.slots.groups import parameter_groups
from openkeye.train.slots.heads import CellHead, SightHead
from openkeye.train.slots.hint_loss import AttentionHints
from openkeye.train.slots.loss import answer_loss, balance_loss
from openkeye.train.slots.optimizer import Optimizer
from openkeye.train.slots.slot_past import SlotPast
from openkeye.train.slots.step_graphs import StepGraphs

SIGHT_LAYER = 2
# the decoder layer after which cells must know what they have become since the frame before

Batches = Callable[[int], Iterator[SlotBatch]]
# from a first step to the batches of that step and all later ones, already on the device


def decoder_layers(model: KeyeModel) -> list[DecoderLayer]:
    """The decoder's layers under their own type."""
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def compile_regions(model: KeyeModel) -> None:
    """Compile what stands between attentions, once for all layers and lengths; the past itself stays as written."""
    for layer in decoder_layers(model):
        layer.begin = torch.compile(layer.begin, dynamic=True)  # type: ignore[method-assign]
        layer.finish = torch.compile(layer.finish, dynamic=True)  # type: ignore[method-assign]
    for vision_layer in model.visual.vision_model.encoder.layers:
        # Frames are padded to one number (`pad_pictures`), so the tower needs one graph only.
        vision_layer.forward = torch.compile(vision_layer.forward, dynamic=False)


def pad_pictures(patches: Patches, num_pictures: int) -> Patches:
    """Repeat the first picture until there are `num_pictures`; all pictures have one size."""
    missing = num_pictures - patches.grid_thw.shape[0]
    if missing <= 0:
        return patches
    size = patches.pixels.shape[0] // patches.grid_thw.shape[0]
    pixels = torch.cat([patches.pixels, patches.pixels[:size].repeat(missing, 1, 1, 1)])
    return Patches(pixels, torch.cat([patches.grid_thw, patches.grid_thw[:1].expand(missing, -1)]))


@dataclass(frozen=True)
class StepPlan:
    """What decides which operations a step consists of."""

    num_clips: int
    num_tokens: int
    attention: str
    trains: str
    has_answers: bool
    has_hints: bool
    has_cells: bool
    num_loss_rows: int
    # of each clip
    indexer_learns_from: str
    wants_figures: bool


@dataclass(frozen=True)
class StepInputs:
    """What changes from step to step, all on the device."""

    batch: SlotBatch
    weights: Tensor
    # [4]: share of the peak learning rates; weights of answers, hints and cells
    loss_rows: Tensor
    # [layers, 2, R] (`SlotPast.loss_rows`)


@dataclass
class Figures:
    """What a step reports: (numerator, denominator) by name, on the device."""

    pairs: dict[str, Tensor] = field(default_factory=dict)

    def means(self, **figures: Tensor) -> None:
        """Figures to be averaged over steps."""
        for name, figure in figures.items():
            self.ratio(name, figure.detach(), torch.ones_like(figure))

    def ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """A figure to be averaged over what the denominator counts."""
        self.pairs[name] = torch.stack([numerator, denominator]).float()


class Trainer:
    """One run: the model, its optimizer and its place in the schedule."""

    def __init__(
        self, model: KeyeModel, config: TrainConfig, tasks: list[str], num_colours: int, num_sprites: int, run_dir: Path
    ) -> None:
        self.model = model
        self.config = config
        self.tasks = tasks
        self.run_dir = run_dir
        self.device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        torch.manual_seed(config.seed)
        # Heads are small and drawn on the host, so that every device begins alike.
        self.cell_head = CellHead(model.config.hidden_size, num_colours, num_sprites).to(self.device, dtype)
        self.sight_head = SightHead(model.config.hidden_size).to(self.device, dtype)
        heads = nn.ModuleList([self.cell_head, self.sight_head])
        self.optimizer = Optimizer(parameter_groups(model, heads, config), clip=config.clip)
        self.middle: Tensor | None = None
        decoder_layers(model)[SIGHT_LAYER].register_forward_hook(self._keep_middle)
        self.graphs = StepGraphs(self.compute, self.device)
        self.task_weights = torch.tensor([config.task_weights.get(task, 1.0) for task in tasks], device=self.device)
        for layer in decoder_layers(model):
            layer.mlp.keeps_router_logits = True
        if self.device.type == "cuda":
            compile_regions(model)
        self.step_number = 0
        self.is_trunk_frozen = False
        self.sums: dict[str, Tensor] = {}
        self.resume()

    def resume(self) -> None:
        """Take up the latest saved state of `run_dir`, if there is one."""
        saved = load_state(self.run_dir)
        if saved is not None:
            self.step_number, tensors = saved
            self.optimizer.load_state_tensors(under("optimizer", tensors))

    def save(self) -> None:
        """Write the state, so that a later `Trainer` on the same folder goes on from this step."""
        save_state(self.run_dir, self.step_number, prefixed("optimizer", self.optimizer.state_tensors()))

    def run(
        self, batches: Batches, stop_after_seconds: float = float("inf"), on_log: Callable[[dict], None] | None = None
    ) -> bool:
        """Train until the last step or the time limit, then save. Returns True where the run is finished."""
        with self.graphs.on_stream():
            return self._run(batches, stop_after_seconds, on_log)

    def _run(self, batches: Batches, stop_after_seconds: float, on_log: Callable[[dict], None] | None) -> bool:
        log = JsonLines(self.run_dir / "log.jsonl")
        started = last = saved = time.monotonic()
        iterator = batches(self.step_number)
        waited = 0.0
        while self.step_number < self.config.num_steps and time.monotonic() - started < stop_after_seconds:
            stage, step_in_stage = self.config.stage_at(self.step_number)
            asked = time.monotonic()
            batch = next(iterator)
            waited += time.monotonic() - asked
            self.step(batch, stage, step_in_stage)
            self.step_number += 1
            if self.step_number % self.config.log_every == 0 or self.step_number == self.config.num_steps:
                now = time.monotonic()
                record = self._drain_sums() | {
                    "step": self.step_number,
                    "stage": stage.name,
                    "seconds": now - started,
                    "ms_per_step": 1000 * (now - last) / self.config.log_every,
                    "ms_for_batch": 1000 * waited / self.config.log_every,
                }
                waited = 0.0
                last = now
                log.write(**record)
                if on_log is not None:
                    on_log(record)
                if now - saved > self.config.save_every_seconds:
                    self.save()
                    saved = last = time.monotonic()
        self.save()
        log.close()
        return self.step_number >= self.config.num_steps

    def step(self, batch: SlotBatch, stage: StageConfig, step_in_stage: int) -> None:
        """One optimizer step; figures gather on the device and reach the host only when logged."""
        progress = step_in_stage / stage.num_steps
        rate = stage.rate_start + (stage.rate_end - stage.rate_start) * progress
        if stage.num_warmup_steps:
            rate *= min(1.0, (step_in_stage + 1) / stage.num_warmup_steps)
        hint_weight = stage.hint_weight_start + (stage.hint_weight_end - stage.hint_weight_start) * progress
        cell_weight = stage.cell_weight_start + (stage.cell_weight_end - stage.cell_weight_start) * progress
        plan = StepPlan(
            num_clips=batch.num_clips,
            num_tokens=batch.layout.num_tokens,
            attention=stage.attention,
            trains=stage.trains,
            has_answers=stage.answer_weight > 0,
            has_hints=max(stage.hint_weight_start, stage.hint_weight_end) > 0,
            has_cells=max(stage.cell_weight_start, stage.cell_weight_end) > 0,
            num_loss_rows=-(-stage.num_indexer_rows // batch.num_clips),
            indexer_learns_from=stage.indexer_learns_from,
            wants_figures=stage.num_indexer_rows > 0 and step_in_stage % 10 == 0,
        )
        # Drawn on the host from the step alone, so that a resumed run samples the same rows as one that never stopped.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step_number)
        rows = torch.rand(len(decoder_layers(self.model)), 2, plan.num_loss_rows, generator=generator)
        weights = torch.tensor([rate, stage.answer_weight, hint_weight, cell_weight])
        inputs = StepInputs(batch, upload(weights, self.device), upload(rows, self.device))
        for name, pair in self.graphs.run(plan, inputs, is_repeated=not plan.wants_figures).items():
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair.clone()

    def compute(self, plan: StepPlan, inputs: StepInputs) -> dict[str, Tensor]:
        """Losses, gradients and update of one step; returns the figures as (numerator, denominator) by name.

        Recorded and replayed (`StepGraphs`): nothing here may wait for the device or depend on a value there.
        """
        batch = inputs.batch
        rate, answer_weight, hint_weight, cell_weight = inputs.weights.unbind()
        past = SlotPast(
            batch.layout,
            batch.num_clips,
            attention=plan.attention,
            top_k=self.model.config.indexer.top_k,
            loss_rows=inputs.loss_rows if plan.num_loss_rows else None,
            learns_from=plan.indexer_learns_from,
            wants_figures=plan.wants_figures,
            hints=AttentionHints(batch) if plan.has_hints else None,
        )
        is_indexer_only = plan.trains == "indexer"
        self._set_trainable(is_indexer_only)
        features = self.model.encode_patches(pad_pictures(batch.patches, self.config.num_frames_per_step))
        features = features[: batch.cells.sprites.shape[0]]
        embeds = self.model.embed(batch.input_ids_BL.flatten(), None, features)
        positions = batch.position_ids_3L.repeat(1, batch.num_clips)
        hidden = self.model(embeds, positions, past)
        figures = Figures()
        losses: list[Tensor] = []
        if plan.has_answers:
            losses += self._answer_losses(batch, hidden, answer_weight, figures)
        if plan.has_hints:
            losses.append(hint_weight * torch.stack(list(past.hint_losses.values())).mean())
            figures.means(**{f"hint_{hop}": loss for hop, loss in past.hint_losses.items()})
        if plan.has_cells:
            cell = self.cell_head.loss(features, batch.cells)
            assert self.middle is not None
            sight = self.sight_head.loss(self.middle[batch.cell_tokens], batch.cells)
            losses.append(cell_weight * (cell + sight))
            figures.means(cell_loss=cell, sight_loss=sight)
        if past.losses:
            losses.append(torch.stack([layer.loss for layer in past.losses]).mean())
            figures.means(indexer_loss=losses[-1])
            if plan.wants_figures:
                figures.means(
                    indexer_recall=torch.stack([layer.recall for layer in past.losses if layer.recall is not None]).mean(),
                    indexer_mass=torch.stack([layer.mass for layer in past.losses if layer.mass is not None]).mean(),
                )
        torch.stack(losses).sum().backward()
        figures.means(gradient_norm=self.optimizer.step(rate, only="indexer" if is_indexer_only else None))
        return figures.pairs

    def _answer_losses(self, batch: SlotBatch, hidden: Tensor, weight: Tensor, figures: Figures) -> list[Tensor]:
        answers = answer_loss(
            self.model.logits(hidden[batch.label_positions]),
            batch.label_ids,
            batch.label_slots,
            batch.task_ids_BN.flatten(),
            self.task_weights,
        )
        mixtures = [layer.mlp for layer in decoder_layers(self.model) if isinstance(layer.mlp, MixtureOfExperts)]
        logits = [mixture.router_logits for mixture in mixtures if mixture.router_logits is not None]
        balance = balance_loss(logits, self.model.config.num_experts_per_tok)
        figures.means(answer_loss=answers.loss, balance=balance)
        for number, task in enumerate(self.tasks):
            figures.ratio(f"exact/{task}", answers.num_exact_by_task[number], answers.num_slots_by_task[number])
        return [weight * answers.loss, self.config.balance_weight * balance]

    def _keep_middle(self, _layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.middle = output

    def _set_trainable(self, is_indexer_only: bool) -> None:
        """Freeze or release the trunk when a stage asks for it."""
        if is_indexer_only == self.is_trunk_frozen:
            return
        self.is_trunk_frozen = is_indexer_only
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("sa_indexer" in name or not is_indexer_only)

    def _drain_sums(self) -> dict[str, float]:
        values: dict[str, float] = defaultdict(float)
        if self.sums:
            table = torch.stack(list(self.sums.values())).tolist()
            values = {name: top / max(bottom, 1e-9) for name, (top, bottom) in zip(self.sums, table, strict=True)}
        values["num_skipped"] = float(self.optimizer.num_skipped)
        self.sums = {}
        return values
