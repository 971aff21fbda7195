"""Loads as a training run does, all ranks in lockstep, until it is killed: for tests/data/test_loader_processes.py.

`python -m tests.data.loader_process FOLDER NUM_RANKS NUM_WORKERS` appends each step's samples to FOLDER/names.jsonl and then
replaces FOLDER/state.json, and goes on from there where it is.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from multiprocessing import active_children
from pathlib import Path

from openkeye.data.config import LoaderConfig, Share
from openkeye.data.loader import Loader, merge_states
from openkeye.data.sample import Source
from tests.data.small_sources import FinishedSource, TextSource, convert

STEP_SECONDS = 0.02


def make_config(num_workers: int = 0) -> LoaderConfig:
    """Weights that change, samples that are bad or too long, an epoch's end."""
    return LoaderConfig(
        context=22,
        tokens_per_pack=50,
        packs_per_step=4,
        shares=(Share("a", 2, 1), Share("b", 0, 2), Share("c", 0.5)),
        num_steps=40,
        seed=11,
        stage="vision",
        num_workers=num_workers,
        max_bad_share=0.3,
    )


def make_sources() -> dict[str, Source]:
    """A small one, one without end, finished documents."""
    return {"a": TextSource("a", 60, bad_every=9), "b": TextSource("b", None, spread=20), "c": FinishedSource("c", 33)}


def main() -> None:
    """See above."""
    folder, num_ranks, num_workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    state_file = folder / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else None
    with ExitStack() as stack, (folder / "names.jsonl").open("a") as names_file:
        loaders = [
            stack.enter_context(Loader(make_sources(), make_config(num_workers), convert, rank, num_ranks, state))
            for rank in range(num_ranks)
        ]
        for step in zip(*loaders, strict=True):
            (folder / "workers.json").write_text(json.dumps([process.pid for process in active_children()]))
            lanes = [step[lane % num_ranks][lane // num_ranks] for lane in range(4)]
            names_file.write(json.dumps([list(lane.names) for lane in lanes]) + "\n")
            names_file.flush()
            state = merge_states([loader.state() for loader in loaders])
            (folder / "state.new").write_text(json.dumps(state))
            os.replace(folder / "state.new", state_file)
            print(state["step"], flush=True)
            time.sleep(STEP_SECONDS)


if __name__ == "__main__":
    main()
