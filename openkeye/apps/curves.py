"""A run's curves as one picture, drawn from its log."""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openkeye.common.checks import writing_to

LOG_FILE, PICTURE_FILE = "log.jsonl", "curves.png"
NUM_NAMED = 8
# lines that a legend names; more of them are layers, told by colour
LOG_FROM = 5.0
# times the smallest value that the largest has to be for a logarithmic axis
Record = Mapping[str, float | int | str]


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def read_log(run_dir: Path) -> list[Record]:
    """Records in the order of their steps; a step that was computed again after a kill counts once, as it was the last time.

    A line that a kill cut off is left out.
    """
    path = run_dir / LOG_FILE
    if not path.is_file():
        return []
    by_step: dict[int, Record] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            by_step[int(record["step"])] = record
    return [by_step[step] for step in sorted(by_step)]


def draw_curves(run_dir: Path) -> Path | None:
    """Draw `curves.png` into the folder; None where its log holds no steps.

    Raises:
        InputError: the folder cannot be written.
    """
    records = read_log(run_dir)
    if not records:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(title, lines, scale) for title, lines, scale in _panels(records) if lines]
    figure = Figure(figsize=(10, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axis, (title, lines, scale)) in enumerate(zip(axes, panels, strict=True)):
        _draw_panel(axis, title, lines, scale)
        _mark_stages(axis, records, has_names=number == 0)
    axes[-1].set_xlabel("step")
    path = run_dir / PICTURE_FILE
    with writing_to(run_dir):
        figure.savefig(path, dpi=110)
    return path


Lines = dict[str, tuple[list[int], list[float]]]


def _panels(records: Sequence[Record]) -> list[tuple[str, Lines, str]]:
    """(title, lines by name, scale of the upward axis) of what the log holds."""
    tasks = _lines(records, lambda name: name.startswith("loss/"), lambda name: name.partition("/")[2])
    answer = _lines(records, lambda name: name == "answer_loss", lambda _: "all answers")
    losses = answer | tasks or _lines(records, lambda name: name == "loss", lambda name: name)
    rates = _lines(records, lambda name: name.startswith("rate/"), lambda name: name.partition("/")[2])
    return [
        ("loss (nats a token)", losses, "log"),
        ("indexer's divergence (KL)", _lines(records, lambda name: name == "indexer_kl", lambda _: "all layers"), "log"),
        ("learning rate", _merged(rates), "log"),
        ("recall of attention's top k", _by_layer(records, "indexer_recall"), "linear"),
        ("attention inside the selection", _by_layer(records, "indexer_mass"), "linear"),
        *_rollout_panels(records),
        ("tokens/s", _lines(records, lambda name: name == "tokens_per_second", lambda _: "all ranks"), "linear"),
    ]


def _rollout_panels(records: Sequence[Record]) -> list[tuple[str, Lines, str]]:
    """Of post-training; without lines elsewhere."""

    def named(*names: str) -> Lines:
        return _lines(records, lambda name: name in names, lambda name: name.replace("_", " "))

    def under(folder: str) -> Lines:
        return _lines(
            records, lambda name: name.startswith(f"{folder}/"), lambda name: name.partition("/")[2].replace("_", " ")
        )

    return [
        ("reward of rollouts", under("reward"), "linear"),
        ("outcome by task", under("outcome"), "linear"),
        ("evaluation", under("evaluation"), "linear"),
        ("rollout against trainer (KL)", named("mismatch/k3", "update/k3"), "log"),
        ("entropy (nats)", named("entropy"), "linear"),
        ("shares of tokens", named("effective_sample_size", "clip_low_share", "clip_high_share", "masked_share"), "linear"),
        ("routes that differ", named("route_disagreement", "route_disagreement_tokens", "index_disagreement"), "linear"),
        ("tokens a rollout", named("length", "length_max"), "linear"),
        ("cut and repeated", named("cut_share", "repetition_share"), "linear"),
        ("age (versions)", named("age", "age_max"), "linear"),
        ("divergence from teachers (k1)", under("kl"), "linear"),
        ("overlap with teachers", named("overlap_ratio", "student_mass", "teacher_mass", "empty_overlap"), "linear"),
        ("scale of domains", under("scale"), "linear"),
        ("dropped samples", under("dropped"), "linear"),
        ("groups and rollouts", under("groups"), "linear"),
        ("seconds by phase", under("seconds"), "linear"),
    ]


def _lines(records: Sequence[Record], is_shown: Callable[[str], bool], label: Callable[[str], str]) -> Lines:
    found: Lines = {}
    for record in records:
        for name, value in record.items():
            if is_shown(name) and isinstance(value, (int, float)):
                steps, values = found.setdefault(label(name), ([], []))
                steps.append(int(record["step"]))
                values.append(float(value))
    return found


def _merged(lines: Lines) -> Lines:
    """Lines that lie on one another as one, with all their names."""
    names: dict[tuple[tuple[int, ...], tuple[float, ...]], list[str]] = {}
    for name, (steps, values) in lines.items():
        names.setdefault((tuple(steps), tuple(values)), []).append(name)
    return {", ".join(sharing): (list(steps), list(values)) for (steps, values), sharing in names.items()}


def _by_layer(records: Sequence[Record], name: str) -> Lines:
    found = _lines(records, lambda key: key.startswith(f"{name}/"), lambda key: f"layer {key.partition('/')[2]}")
    ordered = dict(sorted(found.items(), key=lambda pair: int(pair[0].split()[1])))
    return ordered | _lines(records, lambda key: key == name, lambda _: "mean")


def _draw_panel(axis: Any, title: str, lines: Lines, scale: str) -> None:
    from matplotlib import colormaps

    layers = [name for name in lines if name.startswith("layer ")]
    colours = {name: colormaps["viridis"](number / max(1, len(layers) - 1)) for number, name in enumerate(layers)}
    for number, (name, (steps, values)) in enumerate(lines.items()):
        is_layer = name in colours
        colour = colours.get(name, "black" if name == "mean" else f"C{number % 10}")
        # A single point draws no line.
        marker = "o" if len(steps) == 1 else None
        axis.plot(steps, values, label=name, color=colour, linewidth=1.0 if is_layer else 1.6, marker=marker, markersize=3)
    everything = [value for _, values in lines.values() for value in values if math.isfinite(value)]
    # Over less than a few times its smallest value a plain axis is easier to read.
    if scale == "log" and everything and min(everything) > 0 and max(everything) > LOG_FROM * min(everything):
        axis.set_yscale("log")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    # Of many layers the first and the last are named; whatever else there is has no order to guess by.
    hidden = layers[1:-1] if len(lines) > NUM_NAMED else []
    handles = [line for line in axis.get_lines() if line.get_label() not in hidden]
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _mark_stages(axis: Any, records: Sequence[Record], has_names: bool) -> None:
    """A border where a stage begins, with its name along it."""
    before = None
    axis.set_xlim(int(records[0]["step"]) - 1, int(records[-1]["step"]) + 0.5)
    for record in records:
        stage = record.get("stage")
        if stage == before:
            continue
        step = max(int(records[0]["step"]) - 1, int(record["step"]) - int(record.get("step_in_stage", 1)))
        if before is not None:
            axis.axvline(step, color="0.5", linestyle="--", linewidth=0.8)
        if has_names and stage is not None:
            place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 4), "textcoords": "offset points", "fontsize": 8}
            place |= {"rotation": 90, "verticalalignment": "bottom"}
            # Names lie inside the panel and must not push it aside; upright, those of short stages do not lie on one another.
            axis.annotate(str(stage), (step, 0.0), **place).set_in_layout(False)
        before = stage
