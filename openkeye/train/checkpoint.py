"""Saving and resuming a run (torch.distributed.checkpoint): written beside the training, the last good one always loadable.

`checkpoints/step-N` holds the tensors of all ranks and `place.json`; `checkpoints/latest` names the folder to go on from. A
folder is written under another name and renamed when it is whole, and the pointer after it, so that a process may be killed at
any moment. Any number of ranks can load what any other number wrote.
"""

import json
import os
import shutil
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.train.shard import Ranks

LATEST = "latest"
PLACE_FILE = "place.json"
UNFINISHED = ".unfinished"
NUM_KEPT = 2


@dataclass(frozen=True)
class Place:
    """Where a run is."""

    step: int
    # steps of the whole run that are done
    stage: int
    # of the next step
    step_in_stage: int
    loader_state: dict[str, Any] | None = None
    # of all ranks' lanes, as JSON; None at the beginning of a stage
    policy: dict[str, Any] | None = None
    # what reinforcement learning keeps beside its weights, as JSON: their version, where the run's journal stood

    def __post_init__(self) -> None:
        assert (self.loader_state is None) == (self.step_in_stage == 0), "a stage begins with a new loader"


class Checkpoints:
    """The checkpoints of one run; all ranks call the same methods in the same order, `poll` apart."""

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self.folder = run_dir / "checkpoints"
        self.ranks = ranks
        self._writing: tuple[Future, Place] | None = None
        if ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for rest in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(rest)

    def save(self, place: Place, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors and begin to write them; the training may change them as soon as this returns.

        The save before has to be finished first, and is waited for.
        """
        self.wait()
        folder = self._path(place.step, UNFINISHED)
        random = {f"random.{self.ranks.rank}.{name}": state for name, state in _random_states(self.ranks.device).items()}
        future = dcp.async_save({**tensors, **random}, checkpoint_id=folder, process_group=self.ranks.saving_group)
        assert isinstance(future, Future)
        self._writing = future, place

    def poll(self) -> None:
        """Point to the checkpoint that is being written, if it is whole by now."""
        if self._writing is not None and self._writing[0].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            InputError: it could not be written; the one before is whole.
        """
        if self._writing is None:
            return
        (future, place), self._writing = self._writing, None
        try:
            future.result()
        except (OSError, dcp.api.CheckpointException) as error:
            # The other one's own text is a traceback of every rank.
            first = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
            why = str(first).strip().partition("\n")[0]
            raise InputError(
                f"{self.folder}: the checkpoint of step {place.step} could not be written ({why}); free some space and "
                "start again: the run goes on from the one before"
            ) from error
        # The future of rank 0 is done when the parts of all ranks are written.
        if self.ranks.rank == 0:
            self._publish(place)

    def _publish(self, place: Place) -> None:
        unfinished, folder = self._path(place.step, UNFINISHED), self._path(place.step)
        (unfinished / PLACE_FILE).write_text(json.dumps(asdict(place)))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
        pointer = self.folder / f"{LATEST}{UNFINISHED}"
        pointer.write_text(folder.name + "\n")
        os.replace(pointer, self.folder / LATEST)
        others = [path for path in self.folder.glob("step-*") if path.suffix != UNFINISHED and path != folder]
        for old in sorted(others, key=lambda path: int(path.name.partition("-")[2]))[: 1 - NUM_KEPT or None]:
            shutil.rmtree(old)

    def _path(self, step: int, ending: str = "") -> Path:
        return self.folder / f"step-{step}{ending}"

    @property
    def latest(self) -> Path | None:
        """The folder to go on from; None where the run has not begun.

        Raises:
            InputError: the pointer names a folder that is not there.
        """
        pointer = self.folder / LATEST
        if not pointer.is_file():
            return None
        folder = self.folder / pointer.read_text().strip()
        if not (folder / PLACE_FILE).is_file():
            raise InputError(f"{pointer} names {folder.name}, which is missing: restore it, or delete {pointer} to start over")
        return folder

    def place(self) -> Place | None:
        """Where to go on; None where the run has not begun."""
        folder = self.latest
        return None if folder is None else Place(**json.loads((folder / PLACE_FILE).read_text()))

    def load(self, tensors: dict[str, Tensor], optional: dict[str, Tensor]) -> None:
        """Fill the tensors from the latest checkpoint, in place, and the random states.

        optional: tensors that may be absent there, and then stay as they are: moments of parts that had not trained.

        Raises:
            InputError: the checkpoint cannot be read, or lacks a tensor.
        """
        folder = self.latest
        assert folder is not None, "place() has said that there is nothing to load"
        reader = dcp.FileSystemReader(folder)
        try:
            present = set(reader.read_metadata().state_dict_metadata)
            if missing := sorted(set(tensors) - present):
                raise InputError(f"{folder} lacks {', '.join(missing[:3])}: it is of another model; give another run_dir")
            random = _random_states(self.ranks.device)
            own = {f"random.{self.ranks.rank}.{name}": state for name, state in random.items()}
            found = {name: tensor for name, tensor in {**optional, **own}.items() if name in present}
            dcp.load({**tensors, **found}, storage_reader=reader, process_group=self.ranks.saving_group)
        except (OSError, EOFError, dcp.api.CheckpointException) as error:
            raise InputError(
                f"{folder} cannot be read ({error}): write the name of an older folder into {self.folder / LATEST}"
            ) from error
        # A rank that was not there when it was written begins with its own.
        _set_random_states(random)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
