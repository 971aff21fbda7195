"""A real `openkeye serve` in a process of its own, for tests."""

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "openkeye" / "media" / "demo.mp4"
QUESTION = "When is the red circle visible?"
ANSWER = "From 5.7 to 8.3 seconds."
MODEL = "openkeye-tiny"


@dataclass
class ServerProcess:
    process: subprocess.Popen
    address: str
    # http://HOST:PORT
    errors: list[str] = field(default_factory=list)
    # lines of its standard error so far

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@contextmanager
def serving(*options: str | Path) -> Iterator[ServerProcess]:
    """A server on a free port, ready to answer."""
    command = [sys.executable, "-m", "openkeye.apps.commands", "serve", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while not lines or not (found := re.search(r"(http://\S+) \(page\)", lines[-1])):
            line = process.stderr.readline()
            assert line, lines
            lines.append(line)
        server = ServerProcess(process, found[1], lines)
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
        reader.start()
        yield server
    finally:
        process.kill()
        process.wait()


def workers_of(pid: int) -> list[int]:
    """Process numbers of a process's children."""
    return [child for child, parent in _parents().items() if parent == pid]


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its exit status."""
    return pid in _parents()


def _parents() -> dict[int, int]:
    """The parent of each process that has not ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            # (gone since the folder was listed)
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def endless_model(folder: Path) -> Path:
    """The bundled model without a token that ends its answers: they are as long as they may be."""
    shutil.copytree(ROOT / "openkeye" / "checkpoints" / MODEL, folder / MODEL)
    (folder / MODEL / "generation_config.json").write_text('{"eos_token_id": []}')
    return folder / MODEL


def question(text: str = QUESTION, **options: object) -> dict[str, object]:
    """The body of a request about the bundled clip, named by its path below the media folder."""
    parts = [{"type": "video_url", "video_url": {"url": "demo.mp4"}}, {"type": "text", "text": text}]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], **options}
