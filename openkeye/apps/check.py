"""`openkeye check MODEL_DIR CASE.safetensors`: run a checkpoint on recorded inputs and compare with recorded outputs."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from openkeye.inputs.patches import Patches
    from openkeye.model.config import KeyeConfig
    from openkeye.model.keye import KeyeModel

DOUBLE_PARAMETERS = 500_000_000
# models up to this size are run in double precision, larger ones in fp32
SUMMARY = "compare a checkpoint's outputs with a recorded case"


@dataclass(frozen=True)
class Difference:
    """One compared output."""

    name: str
    value: float
    # largest absolute difference; for positions and selections the number of entries that differ
    limit: float
    num_undecided: int = 0
    # selections only: entries whose scores are equal within the rounding of the recording

    @property
    def is_within(self) -> bool:
        # Written so that a NaN is outside.
        return self.value <= self.limit


@dataclass(frozen=True)
class Case:
    """Recorded inputs and outputs of one prompt, shapes already checked."""

    input_ids: "Tensor"
    # [T] int64
    position_ids: "Tensor"
    # [3, T] int64
    rope_delta: int | None
    images: "Patches | None"
    videos: "Patches | None"
    image_embeds: "Tensor | None"
    video_embeds: "Tensor | None"
    # [merged tokens, hidden]
    selected: "Tensor"
    # [layers, T, T] uint8
    logits: "Tensor"
    # [T, vocabulary]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL_DIR", help="checkpoint folder (or openkeye-tiny)")
    parser.add_argument("case", metavar="CASE.safetensors", help="recorded inputs and outputs")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest absolute difference of embeddings and logits (default: 1e-3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print each difference; returns 0 if all are within their limits, else 1. Positions and selections must be equal."""
    import torch

    from openkeye.inputs.processor import resolve_model_dir
    from openkeye.model.weights import load_model

    model_dir = resolve_model_dir(arguments.model)
    model = load_model(model_dir, "cpu", torch.float32)
    # Double precision halves the rounding between two fp32 computations, which alone can swap positions of nearly equal score.
    if sum(parameter.numel() for parameter in model.parameters()) <= DOUBLE_PARAMETERS:
        model = model.double()
    case = load_case(Path(arguments.case), model.config)
    differences = compare(model, case, arguments.tolerance)
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    is_passed = all(difference.is_within for difference in differences)
    if arguments.json:
        # JSON has no NaN: a broken output shows as null.
        shown = {item.name: item.value if item.value == item.value else None for item in differences}
        shown["selected_undecided"] = sum(item.num_undecided for item in differences)
        print(json.dumps({**shown, "tolerance": arguments.tolerance, "precision": precision, "passed": is_passed}))
        return 0 if is_passed else 1
    for difference in differences:
        unit = " entries differ" if difference.limit == 0 else ""
        text = f"{difference.value:.0f}" if difference.limit == 0 else f"{difference.value:.3g}"
        print(f"{difference.name:16}{text:>10}{unit:16}{'ok' if difference.is_within else 'TOO FAR'}")
        if difference.num_undecided:
            print(f"{'':16}{difference.num_undecided:>10} more are ties within fp32 rounding; the recorded choice was taken")
    verdict = "passed" if is_passed else "FAILED"
    print(f"{verdict}: {case.input_ids.shape[0]} tokens in {precision}, tolerance {arguments.tolerance:g}")
    return 0 if is_passed else 1


def load_case(path: Path, config: "KeyeConfig") -> Case:
    """Read a recorded case and check that it fits the model.

    Raises:
        InputError: the file cannot be read, lacks a tensor, or holds one whose shape does not fit the others or the model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from openkeye.common.checks import InputError

    if not path.is_file():
        raise InputError(f"{path} does not exist: give a recorded case (.safetensors)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy it from its source again") from None
    missing = [name for name in ("input_ids", "position_ids", "selected", "logits") if name not in tensors]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: give a recorded case, not another safetensors file")
    num_tokens = tensors["input_ids"].numel()
    expected = {
        "input_ids": (num_tokens,),
        "position_ids": (3, num_tokens),
        "selected": (config.num_hidden_layers, num_tokens, num_tokens),
        "logits": (num_tokens, config.vocab_size),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(shape)} for this model and prompt")
    input_ids = tensors["input_ids"].to(torch.int64)
    if num_tokens == 0 or int(input_ids.min()) < 0 or int(input_ids.max()) >= config.vocab_size:
        raise InputError(f"{path}: input_ids are empty or outside 0..{config.vocab_size - 1}; the case is for another model")
    images = _patches(path, tensors, "image", config.image_token_id, config)
    videos = _patches(path, tensors, "video", config.video_token_id, config)
    return Case(
        input_ids=input_ids,
        position_ids=tensors["position_ids"],
        rope_delta=int(tensors["rope_delta"]) if "rope_delta" in tensors else None,
        images=images,
        videos=videos,
        image_embeds=tensors.get("image_embeds"),
        video_embeds=tensors.get("video_embeds"),
        selected=tensors["selected"],
        logits=tensors["logits"],
    )


def _patches(path: Path, tensors: dict[str, "Tensor"], kind: str, token_id: int, config: "KeyeConfig") -> "Patches | None":
    """The pictures ("image") or frames ("video") of a case, after checking them against the pads of the prompt."""
    import torch

    from openkeye.common.checks import InputError
    from openkeye.inputs.patches import Patches

    names = [f"{kind}_pixels", f"{kind}_grid_thw", f"{kind}_embeds"]
    there = [name for name in names if name in tensors and tensors[name].numel()]
    ids = tensors["input_ids"]
    num_pads = int((ids == token_id).sum())
    if not there:
        if num_pads and config.vision is not None:
            raise InputError(f"{path}: {num_pads} {kind} pads in input_ids but no {kind} tensors")
        return None
    if len(there) < len(names):
        raise InputError(f"{path} lacks {', '.join(sorted(set(names) - set(there)))}, which go with {there[0]}")
    if config.vision is None:
        raise InputError(f"{path} holds {kind} tensors but the model has no vision_config")
    pixels, grid, embeds = (tensors[name] for name in names)
    patch_shape = (config.vision.num_channels, config.vision.patch_size, config.vision.patch_size)
    merge = config.vision.spatial_merge_size
    if tuple(pixels.shape[1:]) != patch_shape:
        raise InputError(f"{path}: {names[0]} is {list(pixels.shape)}, expected [patches, {', '.join(map(str, patch_shape))}]")
    if grid.ndim != 2 or grid.shape[1] != 3 or bool((grid < 1).any()) or bool((grid[:, 0] != 1).any()):
        raise InputError(f"{path}: {names[1]} must hold one row (1, height, width) in patches per picture or frame")
    if bool((grid[:, 1:] % merge).any()) or int(grid.prod(dim=1).sum()) != pixels.shape[0]:
        raise InputError(f"{path}: {names[1]} does not fit {pixels.shape[0]} patches in blocks of {merge} x {merge}")
    sizes = (grid.prod(dim=1) // merge**2).to(torch.int64)
    if tuple(embeds.shape) != (int(sizes.sum()), config.hidden_size):
        raise InputError(f"{path}: {names[2]} is {list(embeds.shape)}, expected [{int(sizes.sum())}, {config.hidden_size}]")
    # Runs of pads must end where a picture ends; two neighbouring pictures may share a run.
    values, lengths = torch.unique_consecutive(ids, return_counts=True)
    run_ends = set(lengths[values == token_id].cumsum(0).tolist())
    if num_pads != int(sizes.sum()) or not run_ends <= set(sizes.cumsum(0).tolist()):
        raise InputError(f"{path}: the {num_pads} {kind} pads of input_ids do not fall into the pictures of {names[1]}")
    return Patches(pixels.to(torch.float32), grid.to(torch.int64))


def compare(model: "KeyeModel", case: Case, tolerance: float) -> list[Difference]:
    """Run the model on a case's inputs (positions are computed here, never read from it) and measure every output."""
    import torch

    from openkeye.apps.recorded_past import RecordedPast
    from openkeye.inputs.positions import position_ids

    config = model.config
    differences = []
    positions = position_ids(
        case.input_ids,
        None if case.images is None else case.images.grid_thw,
        None if case.videos is None else case.videos.grid_thw,
        config.image_token_id,
        config.video_token_id,
        2 if config.vision is None else config.vision.spatial_merge_size,
    )
    wrong = int((positions != case.position_ids).sum())
    if case.rope_delta is not None:
        wrong += int(positions.max()) + 1 - positions.shape[1] != case.rope_delta
    differences.append(Difference("positions", wrong, 0))
    embeds: dict[str, Tensor | None] = {"image": None, "video": None}
    with torch.inference_mode():
        for kind, patches, recorded in (
            ("image", case.images, case.image_embeds),
            ("video", case.videos, case.video_embeds),
        ):
            if patches is not None:
                vectors = embeds[kind] = model.encode_patches(patches)
                differences.append(Difference(f"{kind}_embeds", _largest(vectors, recorded), tolerance))
        past = RecordedPast(config.indexer.top_k, case.selected)
        logits = model.logits(model(model.embed(case.input_ids, embeds["image"], embeds["video"]), positions, past))
    differences.append(Difference("selected", past.num_wrong, 0, past.num_undecided))
    differences.append(Difference("logits", _largest(logits, case.logits), tolerance))
    return differences


def _largest(ours: "Tensor", recorded: "Tensor | None") -> float:
    """Largest absolute difference; NaN if either holds one."""
    assert recorded is not None
    return float((ours.double() - recorded.double()).abs().max())
