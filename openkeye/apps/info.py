"""`openkeye info NAME_OR_DIR`: parameters per part and bytes of weights and caches, without reading any weight."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.model.config import KeyeConfig
    from openkeye.model.inventory import Inventory

SUMMARY = "print parameters, weight bytes and cache bytes of a model"
CONTEXTS = {"32K": 32 << 10, "128K": 128 << 10, "256K": 256 << 10}
FORMAT_WORDS = {"torch.bfloat16": "bfloat16", "torch.float8_e4m3fn": "e4m3"}
INDEX_FORMAT = "fp8 keys, one fp32 scale per token and layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "model",
        metavar="NAME_OR_DIR",
        help="keye-vl-2.0-30b-a3b (no weights needed), openkeye-tiny, or a folder with config.json",
    )
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="say what fits a GPU of so many GiB: 80 for an H100, 141 for an H200"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="that share the model (torchrun); with --gpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    from pathlib import Path

    from openkeye.inputs.processor import BUNDLED_MODEL, resolve_model_dir
    from openkeye.model.config import KeyeConfig
    from openkeye.model.inventory import take_inventory
    from openkeye.model.published import PACKING_PARAMETERS, published_config
    from openkeye.model.weights import count_packing_parameters

    if arguments.gpu is not None and not arguments.gpu > 0:
        raise InputError(f"--gpu is {arguments.gpu}; give the GPU's memory in GiB, such as 80")
    if arguments.gpus < 1 or (arguments.gpus > 1 and arguments.gpu is None):
        raise InputError(f"--gpus is {arguments.gpus}; give how many share the model, and --gpu with the memory of each")
    if arguments.model == BUNDLED_MODEL or Path(arguments.model).exists():
        folder = resolve_model_dir(arguments.model)
        config = KeyeConfig.load(folder)
        num_packing = count_packing_parameters(folder)
    else:
        config = published_config(arguments.model)
        num_packing = PACKING_PARAMETERS
    inventory = take_inventory(config, num_packing)
    of_rank = take_inventory(config, num_packing, arguments.gpus)
    if arguments.json:
        table = _as_json(arguments.model, config, inventory)
        if arguments.gpu is not None:
            table["gpu"] = [asdict(fit) for fit in _fits(arguments.gpu, arguments.gpus, config, of_rank)]
        print(json.dumps(table))
    else:
        _print_tables(arguments.model, config, inventory)
        if arguments.gpu is not None:
            _print_fits(arguments.gpu, arguments.gpus, config, of_rank)
    return 0


@dataclass(frozen=True)
class Fit:
    """What fits a GPU, of those that share a model, with weights and caches in formats that the engine has."""

    weights: str
    weight_bytes: int
    kv_format: str
    index_format: str
    cache_bytes_per_token: int
    cache_tokens: int
    # whole pages
    fits_whole_context: bool


def _fits(gibibytes: float, num_gpus: int, config: "KeyeConfig", inventory: "Inventory") -> list[Fit]:
    """A row for every choice of `EngineConfig.experts` (of a model that has some) and `kv_cache`.

    Index keys are what "auto" means on a GPU.
    """
    import torch

    from openkeye.engine.config import EngineConfig
    from openkeye.engine.pages import CacheFormats
    from openkeye.model.sharding import local_config

    local, fits = local_config(config, num_gpus), []
    choices = [("bfloat16", inventory.weight_bytes)]
    if config.num_experts:
        choices.append(("experts in e4m3", inventory.weight_bytes_e4m3))
    for weights, num_bytes in choices:
        for kv_cache in ("auto", "e4m3"):
            engine = EngineConfig(kv_cache=kv_cache)
            formats = CacheFormats.choose(engine, torch.device("cuda"), torch.bfloat16)
            per_token = formats.bytes_per_token(local)
            free = max(0, int(gibibytes * 2**30) - engine.work_bytes - num_bytes)
            tokens = free // per_token // engine.page_size * engine.page_size
            words = (FORMAT_WORDS[str(formats.kv)], FORMAT_WORDS[str(formats.index)])
            fits.append(Fit(weights, num_bytes, *words, per_token, tokens, tokens >= config.max_position_embeddings))
    return fits


def _print_fits(gibibytes: float, num_gpus: int, config: "KeyeConfig", inventory: "Inventory") -> None:
    from rich.console import Console
    from rich.table import Table

    from openkeye.engine.config import EngineConfig

    console = Console(width=None if sys.stdout.isatty() else 100)
    where = "on one GPU" if num_gpus == 1 else f"on each of {num_gpus} GPUs"
    work = EngineConfig().work_bytes / 2**30
    fits = _fits(gibibytes, num_gpus, config, inventory)
    title = f"{where} of {gibibytes:g} GiB, {work:g} of them kept for work; index keys in {fits[0].index_format}"
    table = Table(title=title)
    whole = f"a context of {config.max_position_embeddings:,}"
    for heading in ("weights", "GiB", "keys, values", "bytes a token", "tokens that fit", whole):
        table.add_column(heading, justify="left" if heading in ("weights", "keys, values") else "right")
    for fit in fits:
        size, word = f"{fit.weight_bytes / (1 << 30):.2f}", "fits" if fit.fits_whole_context else "does not fit"
        cells = (fit.weights, size, fit.kv_format, f"{fit.cache_bytes_per_token:,}", f"{fit.cache_tokens:,}", word)
        table.add_row(*cells)
    console.print(table)


def _as_json(name: str, config: "KeyeConfig", inventory: "Inventory") -> dict[str, object]:
    return {
        "model": name,
        "total_parameters": inventory.num_parameters,
        "active_parameters": inventory.num_active,
        "num_tensors": inventory.num_tensors,
        "unused_parameters": sum(part.num_parameters for part in inventory.parts if "unused" in part.name),
        "weight_bytes": inventory.weight_bytes,
        "weight_format": "bfloat16",
        "kv_bytes_per_token": inventory.kv_bytes_per_token,
        "kv_format": "bfloat16",
        "index_bytes_per_token": inventory.index_bytes_per_token,
        "index_format": INDEX_FORMAT,
        "index_bytes_per_token_bf16": inventory.index_bytes_per_token_bf16,
        "max_position_embeddings": config.max_position_embeddings,
        "top_k": config.indexer.top_k,
        "parts": [
            {
                "name": part.name,
                "parameters": part.num_parameters,
                "num_tensors": part.num_tensors,
                "active_parameters": part.num_active,
            }
            for part in inventory.parts
        ],
        "cache_bytes": {
            name: {
                "tokens": tokens,
                "kv_bytes": tokens * inventory.kv_bytes_per_token,
                "index_bytes": tokens * inventory.index_bytes_per_token,
            }
            for name, tokens in CONTEXTS.items()
        },
    }


def _print_tables(name: str, config: "KeyeConfig", inventory: "Inventory") -> None:
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width of its own; a table folded to 80 columns would break the numbers.
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title=f"{name}: parameters")
    for heading in ("part", "tensors", "parameters", "active per text token"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in inventory.parts:
        table.add_row(part.name, f"{part.num_tensors:,}", f"{part.num_parameters:,}", f"{part.num_active:,}")
    table.add_section()
    table.add_row("total", f"{inventory.num_tensors:,}", f"{inventory.num_parameters:,}", f"{inventory.num_active:,}")
    console.print(table)
    memory = Table(title="memory")
    for heading in ("what", "bytes", "GiB", "format"):
        memory.add_column(heading, justify="right" if heading in ("bytes", "GiB") else "left")

    def add(what: str, num_bytes: int, layout: str) -> None:
        memory.add_row(what, f"{num_bytes:,}", f"{num_bytes / (1 << 30):.2f}", layout)

    add("weights", inventory.weight_bytes, "bfloat16")
    for context, tokens in CONTEXTS.items():
        memory.add_section()
        beyond = "" if tokens <= config.max_position_embeddings else " (beyond its context)"
        add(f"KV cache, {context} tokens{beyond}", tokens * inventory.kv_bytes_per_token, "bfloat16")
        add(f"index cache, {context} tokens{beyond}", tokens * inventory.index_bytes_per_token, INDEX_FORMAT)
    console.print(memory)
    console.print(
        f"per token: KV {inventory.kv_bytes_per_token:,} bytes; index {inventory.index_bytes_per_token:,} bytes "
        f"({inventory.index_bytes_per_token_bf16:,} in bfloat16)",
        highlight=False,
    )
    chosen = f", {config.num_experts_per_tok} of {config.num_experts} experts" if config.num_experts else ""
    console.print(f"active: the decoder with its embeddings and head{chosen}", highlight=False)
