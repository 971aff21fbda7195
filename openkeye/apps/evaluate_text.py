"""`openkeye evaluate text`: what a text model loses by selecting, on real text: perplexity, recall by layer, needles."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from openkeye.inputs.processor import Processor
    from openkeye.model.keye import KeyeModel
    from openkeye.train.text_evaluation import Mode, SelectionFigures

CHOICES = (64, 128, 256, 512, 1024)
LENGTHS = (1024, 2048, 4096, 8192)


def add_text_suite(suite: argparse.ArgumentParser) -> None:
    """Options of the suite."""
    suite.add_argument("--model", required=True, metavar="DIR", help="a text model, such as `openkeye convert` writes")
    suite.add_argument("--files", required=True, nargs="+", metavar="FILE", help="plain text that training never saw")
    suite.add_argument("--context", type=int, metavar="N", help="tokens of a document (default: 2,048)")
    suite.add_argument("--documents", type=int, default=16, metavar="N", help="at most, spread over the files (default: 16)")
    suite.add_argument("--k", type=int, nargs="+", default=CHOICES, help="keys that sparse attention selects")
    suite.add_argument("--oracle", action="store_true", help="also select attention's own top k: what an indexer could reach")
    suite.add_argument("--needles", type=int, default=2, metavar="N", help="a depth and length; 0: none (default: 2)")
    suite.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of needle documents (default: 1,024 to 8,192)")
    suite.add_argument("--seed", type=int, default=0, help="of the needles")
    suite.add_argument("--device", default=None, help="cpu or cuda (default: a GPU where there is one)")
    suite.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Read, walk, measure, print."""
    from pathlib import Path

    import torch

    from openkeye.inputs.processor import Processor, resolve_model_dir
    from openkeye.model.weights import load_model
    from openkeye.train.text_evaluation import Mode, cut_documents, selection_figures, token_losses

    folder = resolve_model_dir(arguments.model)
    processor = Processor.load(folder)
    _check_options(arguments, processor)
    texts = [_read_text(Path(name)) for name in arguments.files]
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    documents = cut_documents(texts, processor, arguments.context, arguments.documents)
    attentions = ("sparse", "oracle") if arguments.oracle else ("sparse",)
    modes = [Mode("dense"), *(Mode(attention, k) for attention in attentions for k in sorted(set(arguments.k)))]
    losses = {str(mode): token_losses(model, documents, mode) for mode in _shown(modes, "Reading")}
    choices = [k for k in sorted(set(arguments.k)) if k < arguments.context]
    report = {
        "settings": {
            "model": arguments.model,
            "context": arguments.context,
            "num_documents": len(documents),
            "device": device.type,
            "seed": arguments.seed,
        },
        "perplexity": _perplexities(losses),
        "selection": _selection(selection_figures(model, documents, choices), choices) if choices else {},
        "needles": _needles(arguments, model, processor, texts, modes),
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_tables(report)
    return 0


def _check_options(arguments: argparse.Namespace, processor: "Processor") -> None:
    longest = processor.max_tokens or max(LENGTHS)
    if arguments.context is None:
        arguments.context = min(2048, longest)
    if not 2 <= arguments.context <= longest:
        raise InputError(f"--context is {arguments.context}; give 2 to {longest:,}, the model's positions")
    if min(arguments.k) < 1 or arguments.documents < 1 or arguments.needles < 0:
        raise InputError("--k and --documents must be at least 1 and --needles at least 0")
    if arguments.lengths is None:
        arguments.lengths = [length for length in LENGTHS if length <= longest]
    elif max(arguments.lengths) > longest:
        raise InputError(f"--lengths: {max(arguments.lengths):,} is beyond the model's {longest:,} positions")


def _read_text(path: "Any") -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give files of plain text")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give files of plain text") from None


def _shown(items: "Sequence[Any]", label: str) -> "Any":
    """The items with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, label, console=console, disable=not console.is_terminal, transient=True)


def _perplexities(losses: "dict[str, np.ndarray]") -> dict[str, Any]:
    """Of each mode over whole documents and over their last halves; `increase` over dense is a share, with paired intervals."""
    import numpy as np

    from openkeye.train.text_evaluation import bootstrap

    report: dict[str, Any] = {}
    for name, loss_BT in losses.items():
        row = report[name] = {}
        half = loss_BT.shape[1] // 2
        for part, columns in (("whole", slice(None)), ("last_half", slice(half, None))):
            values = loss_BT[:, columns].mean(axis=1)
            more = values - losses["dense"][:, columns].mean(axis=1)
            row[part] = {"value": float(np.exp(values.mean())), "interval": bootstrap(values, np.exp)}
            if name != "dense":
                row[part]["increase"] = float(np.expm1(more.mean()))
                row[part]["increase_interval"] = bootstrap(more, np.expm1)
    return report


def _selection(figures: "SelectionFigures", choices: list[int]) -> dict[str, Any]:
    """Recall and mass for each k: mean over layers with an interval over documents, and layer by layer."""
    from openkeye.train.text_evaluation import bootstrap

    report: dict[str, Any] = {}
    for number, k in enumerate(choices):
        row = report[str(k)] = {}
        for name in ("recall", "mass", "best_mass"):
            values_LB = getattr(figures, f"{name}_LCB").transpose(0, 2, 1)[..., number]
            row[name] = {"value": float(values_LB.mean()), "interval": bootstrap(values_LB.mean(axis=0))}
            row[name]["by_layer"] = [round(float(value), 4) for value in values_LB.mean(axis=1)]
    return report


def _needles(
    arguments: argparse.Namespace, model: "KeyeModel", processor: "Processor", texts: list[str], modes: "list[Mode]"
) -> dict[str, Any]:
    """Length -> mode -> shares of needles found, all modes asked the same."""
    import numpy as np

    from openkeye.train.text_evaluation import ask_needle, bootstrap, make_needles

    report: dict[str, Any] = {}
    for length in arguments.lengths if arguments.needles else ():
        needles = list(make_needles(texts, processor, length, arguments.needles, arguments.seed))
        row: dict[str, Any] = {"num_needles": len(needles)}
        report[str(length)] = row
        for mode in _shown(modes, f"Needles in {length:,} tokens"):
            found = np.array([ask_needle(model, needle, mode) for needle in needles], dtype=float)
            row[str(mode)] = {
                "likeliest": float(found[:, 0].mean()),
                "likeliest_interval": bootstrap(found[:, 0]),
                "exact": float(found[:, 1].mean()),
                "exact_interval": bootstrap(found[:, 1]),
            }
    return report


def _print_tables(report: dict[str, Any]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    settings = report["settings"]
    table = Table(title=f"perplexity: {settings['num_documents']} documents of {settings['context']:,} tokens")
    for heading in ("attention", "whole", "over dense", "last half", "over dense", "95% interval"):
        table.add_column(heading)
    for name, row in report["perplexity"].items():
        cells = [name]
        for part in ("whole", "last_half"):
            cells += [f"{row[part]['value']:.3f}", f"{row[part]['increase']:+.2%}" if name != "dense" else ""]
        last = row["last_half"]
        cells.append("{:+.2%} to {:+.2%}".format(*last["increase_interval"]) if name != "dense" else "")
        table.add_row(*cells)
    console.print(table)
    table = Table(title="the indexer's selection, on dense attention's walk")
    for heading in ("k", "recall", "95% interval", "worst layer", "mass inside", "mass in attention's own top k"):
        table.add_column(heading)
    for k, row in report["selection"].items():
        recall, cells = row["recall"], [k, f"{row['recall']['value']:.3f}"]
        cells += ["{:.3f} to {:.3f}".format(*recall["interval"]), f"{min(recall['by_layer']):.3f}"]
        table.add_row(*cells, f"{row['mass']['value']:.3f}", f"{row['best_mass']['value']:.3f}")
    console.print(table)
    for k, row in report["selection"].items():
        console.print(f"recall by layer, k {k}: {' '.join(f'{v:.2f}' for v in row['recall']['by_layer'])}", highlight=False)
    if report["needles"]:
        table = Table(title="needles: right number likeliest of ten / written exactly")
        table.add_column("attention")
        for length, row in report["needles"].items():
            table.add_column(f"{int(length):,} tokens ({row['num_needles']})")
        for name in report["perplexity"]:
            rows = [row[name] for row in report["needles"].values()]
            table.add_row(name, *(f"{row['likeliest']:.2f} / {row['exact']:.2f}" for row in rows))
        console.print(table)
