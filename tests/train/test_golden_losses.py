"""The first losses of a small run from `openkeye-tiny`: whatever changes them has changed what is learnt.

python -m tests.train.test_golden_losses        # writes tests/golden/training_losses.json anew
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openkeye.data.config import LoaderConfig, Share, SourceConfig
from openkeye.data.document import Document, PixelPictures
from openkeye.data.loader import Loader
from openkeye.inputs.processor import BUNDLED_MODEL
from openkeye.train.config import RunConfig, StageConfig
from openkeye.train.loop import Trainer
from openkeye.train.reporter import SilentReporter
from openkeye.train.shard import Ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "training_losses.json"
IMAGE, VIDEO, FIRST_WORD = 5, 6, 20
FIGURES = ("answer_loss", "indexer_kl", "balance")


@dataclass(frozen=True)
class Squares:
    """A picture of four coloured squares, or none, and tokens that name the colours or count up."""

    num_samples: int | None = 200

    def read(self, index: int) -> Document:
        """See `Source.read`."""
        rng = np.random.default_rng([11, index])
        has_picture = index % 3 != 2
        colours = rng.integers(0, 8, 4)
        words = FIRST_WORD + (np.repeat(colours, 3) if has_picture else rng.integers(40) + np.arange(int(rng.integers(4, 40))))
        levels = np.array([[colour >> bit & 1 for bit in range(3)] for colour in colours], dtype=np.uint8) * 200 + 20
        pixels = levels.reshape(1, 2, 2, 3).repeat(28, axis=1).repeat(28, axis=2)
        num_media = 4 if has_picture else 0
        length = num_media + len(words)
        is_media = torch.arange(length) < num_media
        positions = torch.arange(length)
        return Document(
            name=f"squares:{index}",
            input_ids=torch.cat([torch.full((num_media,), IMAGE), torch.from_numpy(words)]),
            position_ids=positions.expand(3, -1).clone(),
            is_learnt=positions >= num_media + 1,
            is_media=is_media,
            pictures=(PixelPictures([pixels]),) if has_picture else (),
            task="colours" if has_picture else "counting",
        )


def squares_loader(loader: LoaderConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> Loader:
    """The loader of the documents above."""
    return Loader({"squares": Squares()}, loader, _unused, ranks.rank, ranks.size, state)


def _unused(sample: Any) -> Document:
    raise AssertionError("the source hands out documents")


def recipe(folder: Path) -> RunConfig:
    """Twenty steps in four stages: the projector, all, the indexer's warm-up, the sparse adaptation."""
    common = {"context": 64, "mixture": (Share("squares"),), "tokens_per_pack": 64, "packs_per_step": 2, "num_warmup_steps": 2}
    every = ("vision", "projector", "decoder")
    return RunConfig(
        model_dir=BUNDLED_MODEL,
        run_dir=str(folder / "run"),
        out_dir=str(folder / "out"),
        sources={"squares": SourceConfig("squares")},
        stages=(
            StageConfig("projector", 4, trains=("projector",), rate=1e-4, **common),
            StageConfig("all", 6, trains=every, rate=2e-5, balance_weight=1e-2, **common),
            StageConfig("warm-up", 4, trains=("indexer",), indexer_target="dense", answer_weight=0.0, rate=2e-4, **common),
            StageConfig(
                "adaptation", 6, trains=(*every, "indexer"), attention="sparse", indexer_target="selected", rate=2e-5, **common
            ),
        ),
        seed=3,
        compute_dtype="float32",
        num_workers=0,
        log_every=1,
        metrics_every=1000,
        save_every_seconds=1e6,
    )


def losses(folder: Path) -> list[dict[str, float | str]]:
    """Stage and figures of every step, on one thread of a CPU."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reporter = SilentReporter()
    try:
        Trainer(recipe(folder), reporter, squares_loader, torch.device("cpu")).run()
    finally:
        torch.set_num_threads(num_threads)
    names = ("stage", *FIGURES)
    return [{name: record[name] for name in names if name in record} for record in reporter.records]


def test_the_first_twenty_losses_are_the_golden_ones(tmp_path: Path):
    expected = json.loads(GOLDEN.read_text())
    own = losses(tmp_path)
    assert len(own) == len(expected) == 20
    for step, (now, then) in enumerate(zip(own, expected, strict=True)):
        assert now.keys() == then.keys() and now["stage"] == then["stage"], step
        for name in FIGURES:
            if name in then:
                # Another processor's rounding, which steps of Adam amplify: the rates are small, so that it stays below this.
                assert now[name] == pytest.approx(then[name], rel=1e-4, abs=1e-4), (step, name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(Path(folder)), indent=1) + "\n")
    print(f"wrote {GOLDEN}")
