"""`Publisher`: a learner's weights in files, as changes to what was published last wherever those are smaller.

An update changes few bits of weights in bfloat16. Files of changes lie behind the whole weights that they rest on, until
together they are as large as those: then the weights are written whole again. A worker that is behind reads the files in
their order.
"""

from collections import deque
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from openkeye.engine.update_file import write_update
from openkeye.engine.weight_update import Change, WeightUpdate, changes_between
from openkeye.rl.roles import Publication


class Publisher:
    """Of one rank, which writes the files of all."""

    def __init__(self) -> None:
        self._version: int | None = None
        # published last; None: nothing yet, or by a process that is gone
        self._known: dict[str, Tensor] = {}
        # its tensors, on the host
        self._last: Publication | None = None
        self._chain_bytes = self._whole_bytes = 0

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]], folder: Path) -> Publication:
        """Write a version.

        Raises:
            OSError: the folder cannot be written to.
        """
        if version == self._version and self._last is not None:
            # (other ranks go through the weights too, and wait for this one)
            deque(weights, maxlen=0)
            return self._last
        is_known, base = bool(self._known), self._version
        tensors: dict[str, Tensor] = {}
        changes: dict[str, Change] = {}
        for name, tensor in weights:
            if is_known:
                # One at a time: the device holds no second copy of all.
                changes |= changes_between({name: self._known[name].to(tensor.device)}, {name: tensor})
            tensors[name] = tensor.cpu()
        self._whole_bytes = sum(tensor.nbytes for tensor in tensors.values())
        num_bytes = sum(change.nbytes for change in changes.values())
        is_whole = not is_known or self._chain_bytes + num_bytes >= self._whole_bytes
        if is_whole:
            path = write_update(folder, WeightUpdate(version, tensors))
            rests_on: tuple[str, ...] = ()
            self._chain_bytes = 0
        else:
            path = write_update(folder, WeightUpdate(version, changes, base))
            last = self._last
            # (the first changes may be told against the checkpoint that everyone begins with)
            rests_on = () if last is None or not base else (*last.rests_on, last.path)
            self._chain_bytes += num_bytes
        self._version, self._known = version, tensors
        self._last = Publication(version, str(path), rests_on, path.stat().st_size)
        return self._last

    def begin(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the weights of version 0, which workers have from their checkpoint."""
        self._version, self._known, self._last, self._chain_bytes = 0, {name: one.cpu() for name, one in weights}, None, 0
