"""Run untrusted programs: walled in, limited, and gone when they end.

Each run has a file system in memory of its own with the system's programs read-only in it, no network, no view of other
processes, a user that nobody else is, and limits on time, memory, processes, output and files (`sandbox_process.py`). This
takes Linux namespaces: root makes them, a plain user makes them inside a user namespace (Linux 5.14), or bubblewrap does where
the system lets only known tools do so. Where none of it works, the network cannot be cut off and runs are refused, unless
`allow_network=True` is said: then limits hold and processes are killed whole, but files are guarded by permissions alone.
"""

import asyncio
import base64
import itertools
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openkeye.agents.sandbox_lifeline import SandboxError, ask
from openkeye.common.checks import InputError

PROCESS = Path(__file__).with_name("sandbox_process.py")
FOLDER = "/box"
# where a program starts and finds its files
SPARE_SECONDS = 20.0
# what the process beside a program may take for itself, on a machine that is busy
SPARE_ADDRESS_BYTES = 128 << 20
# address space of libraries and interpreters, that no memory stands behind
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
LIMITS = ("wall", "cpu", "memory", "output", "file")
OLDEST_LINUX = (5, 14)
# From here on processes are counted by user namespace, and mounts are made read-only with all below them.


@dataclass(frozen=True)
class Limits:
    """What one run may take."""

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    # of all its processes together
    memory_bytes: int = 512 << 20
    # resident in all its processes together; one process gets no more address space than this and a little
    output_bytes: int = 1 << 20
    # on each of its two streams
    file_bytes: int = 64 << 20
    # of one file
    folder_bytes: int = 256 << 20
    # of all its files, which lie in memory
    num_processes: int = 32
    # threads are counted too

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"sandbox limit {name} is {value}; give a number above 0")


@dataclass(frozen=True)
class Program:
    """What to run."""

    command: tuple[str, ...]
    # "python" is this interpreter without site packages; other names are looked up in the system's folders
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    # by path in the folder where it starts; all may be executed
    stdin: str | bytes = ""
    outputs: tuple[str, ...] = ()
    # paths of files to bring back
    variables: Mapping[str, str] = field(default_factory=dict)
    # of its environment

    def __post_init__(self) -> None:
        if not self.command:
            raise InputError("sandbox: an empty command; give a program and its arguments")
        for name in (*self.files, *self.outputs):
            if not is_inner_path(name):
                raise InputError(f"sandbox: {name!r} is no path inside the folder; give one like src/main.py")


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    exit_code: int
    # minus the signal's number where one ended it
    limit: str | None
    # of LIMITS: the one that it passed, for which it was killed
    stdout: str
    stderr: str
    files: Mapping[str, bytes]
    # of `Program.outputs`, those that are there
    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    # highest seen

    @property
    def is_success(self) -> bool:
        return self.exit_code == 0 and self.limit is None


@dataclass(frozen=True)
class SandboxAbilities:
    """What this machine allows, found by trying."""

    mode: str
    # "namespaces", "bubblewrap" or "plain"
    changes_user: bool
    # each run is a user of its own; else processes are counted by user namespace, or (plain) with the user's others
    has_proc: bool
    # memory and CPU time are summed over processes; else they are limited for each
    reason: str = ""
    # why not a better mode

    @property
    def has_no_network(self) -> bool:
        return self.mode != "plain"


def is_inner_path(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    parts = name.split("/")
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


@dataclass(frozen=True)
class Sandbox:
    """Runs programs, several at once. It holds settings alone, so that it can be pickled.

    Attributes:
        limits: of a run that brings none of its own.
        num_at_once: runs under way at a time in one event loop; others wait.
        allow_network: lets programs reach the network, and runs them even where they cannot be walled in.
        readable: further folders of the host that programs may read.
    """

    limits: Limits = Limits()
    num_at_once: int = 4
    allow_network: bool = False
    readable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_at_once < 1:
            raise InputError(f"sandbox: num_at_once is {self.num_at_once}; give at least 1")

    async def run(self, program: Program, limits: Limits | None = None) -> Ended:
        """Run a program to its end or its limit. A cancelled run is killed.

        Raises:
            InputError: not on Linux, or no way to cut the network off here.
            SandboxError: the sandbox broke.
        """
        abilities = await find_abilities()
        if not self.allow_network and not abilities.has_no_network:
            raise InputError(
                f"sandbox: this machine lets no network be cut off ({abilities.reason}), so untrusted programs are refused; "
                "allow user namespaces, run as root with CAP_SYS_ADMIN, install bubblewrap, or say allow_network=True"
            )
        async with _place(self.num_at_once):
            return await _run(program, limits or self.limits, abilities, self)


async def find_abilities() -> SandboxAbilities:
    """What this machine allows; tried once in a process.

    Raises:
        InputError: not on Linux.
    """
    if not sys.platform.startswith("linux"):
        raise InputError(f"sandbox: programs are run on Linux only, this is {sys.platform}; use a Linux machine or container")
    if not _found:
        _found.append(await _try_modes())
    return _found[0]


_found: list[SandboxAbilities] = []
_places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = weakref.WeakKeyDictionary()

PROBE = """
import socket, sys
names = [name for _, name in socket.if_nameindex()]
sys.exit(0 if names in ([], ["lo"]) else 3)
"""


async def _try_modes() -> SandboxAbilities:
    changes_user = os.geteuid() == 0 and _user_of(0) is not None
    tries = [SandboxAbilities("namespaces", changes_user, has_proc) for has_proc in (True, False)]
    if shutil.which("bwrap") is not None and not changes_user:
        # As root it would map every user to root, whose processes nobody counts.
        tries.append(SandboxAbilities("bubblewrap", False, True))
    reason = "" if changes_user or _linux_version() >= OLDEST_LINUX else "Linux is older than 5.14"
    for abilities in tries if not reason else []:
        try:
            ended = await _run(Program(("python", "-c", PROBE)), Limits(), abilities, Sandbox())
        except SandboxError as error:
            reason = str(error)
            continue
        if ended.is_success:
            return replace(abilities, reason=reason)
        reason = ended.stderr.strip()[-200:] or f"the trial of {abilities.mode} ended with {ended.exit_code}"
    return SandboxAbilities("plain", changes_user, True, reason)


def _linux_version() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)) or 0)


def _user_of(number: int) -> int | None:
    """A user that nobody else is, another for each process number; None where too few are mapped into this namespace."""
    rows = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, length = max(rows, key=lambda row: row[2])
    if length < 1 << 12:
        return None
    # Far above users that exist, far below the largest number, which stands for nobody.
    if length > 1 << 31:
        return (1 << 30) + number
    return first + length - 2 - number % (length // 4)


@asynccontextmanager
async def _place(num_at_once: int) -> AsyncIterator[None]:
    places = _places.setdefault(asyncio.get_running_loop(), {})
    async with places.setdefault(num_at_once, asyncio.Semaphore(num_at_once)):
        yield


def _order(program: Program, limits: Limits, abilities: SandboxAbilities, sandbox: Sandbox, folder: str) -> dict[str, Any]:
    """What `sandbox_process.py` reads, all but the user."""
    interpreter = _interpreter(abilities)
    home = os.path.realpath(sys.base_prefix)
    readable = [*SYSTEM_FOLDERS, *SYSTEM_FILES]
    for path in (home, *map(os.path.abspath, sandbox.readable)):
        if not any(path == known or path.startswith(known + "/") for known in readable):
            readable.append(path)
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "TMPDIR": folder if abilities.mode == "plain" else "/tmp"}
    command = list(program.command)
    if command[0] == "python":
        command[:1] = [interpreter, "-S", "-s"]
    elif "/" not in command[0]:
        command[0] = shutil.which(command[0], path=variables["PATH"]) or command[0]
    elif is_inner_path(command[0].removeprefix("./")):
        command[0] = f"{folder}/{command[0].removeprefix('./')}"
    return {
        "mode": abilities.mode,
        "has_proc": abilities.has_proc,
        "allow_network": sandbox.allow_network,
        "readable": readable,
        "hidden": [str(PROCESS.parent.parent)],
        # Generated tasks could be read there, and their answers.
        "folder": folder,
        "command": command,
        "variables": variables | dict(program.variables),
        "files": {name: _encode(content) for name, content in program.files.items()},
        "stdin": _encode(program.stdin),
        "outputs": list(program.outputs),
        "address_bytes": limits.memory_bytes + SPARE_ADDRESS_BYTES,
        **vars(limits),
    }


def _interpreter(abilities: SandboxAbilities) -> str:
    """This Python; where programs are another user's and see the host's files, one that this user can reach."""
    interpreter = Path(sys.executable).resolve()
    if abilities.mode != "plain" or not abilities.changes_user:
        return str(interpreter)
    if all(path.stat().st_mode & 0o001 for path in (interpreter, *interpreter.parents)):
        return str(interpreter)
    found = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if found is None:
        raise InputError(f"sandbox: {interpreter} is not for other users; install Python in a folder that all may read")
    return found


def _encode(content: str | bytes) -> str:
    # Text of a model may hold halves of characters.
    return base64.b64encode(content.encode(errors="replace") if isinstance(content, str) else content).decode()


def _bubblewrap(order: Mapping[str, Any]) -> list[str]:
    """The command that makes bubblewrap build what `sandbox_process.py` builds itself in the mode "namespaces"."""
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--proc", "/proc", "--dev", "/dev"]
    for path in order["readable"]:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    for path in order["hidden"]:
        if any(path.startswith(known + "/") for known in order["readable"]):
            words += ["--tmpfs", path]
    for path in ("/tmp", FOLDER):
        words += ["--size", str(order["folder_bytes"]), "--tmpfs", path]
    if order["allow_network"]:
        words.append("--share-net")
    return [*words, "--ro-bind", str(PROCESS), "/sandbox_process.py", "--chdir", "/"]


async def _run(program: Program, limits: Limits, abilities: SandboxAbilities, sandbox: Sandbox) -> Ended:
    folder = tempfile.mkdtemp(prefix="openkeye-sandbox-") if abilities.mode == "plain" else FOLDER
    try:
        order = _order(program, limits, abilities, sandbox, folder)
        words = [os.path.realpath(sys.executable), "-I", "-S", str(PROCESS)]
        if abilities.mode == "bubblewrap":
            words = [*_bubblewrap(order), *words[:-1], "/sandbox_process.py"]

        def order_for(number: int) -> dict[str, Any]:
            user = {"uid": _user_of(number) if abilities.changes_user else None}
            return order | user | {"max_user_processes": limits.num_processes + _num_counted_besides(abilities)}

        answer = await ask(words, order_for, limits.wall_seconds + SPARE_SECONDS)
    finally:
        if abilities.mode == "plain":
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    stdout, stderr = (base64.b64decode(answer.pop(name)).decode(errors="replace") for name in ("stdout", "stderr"))
    files = {name: base64.b64decode(content) for name, content in answer.pop("files").items()}
    return Ended(**answer, stdout=stdout, stderr=stderr, files=files)


def _num_counted_besides(abilities: SandboxAbilities) -> int:
    """Processes that the kernel counts with the program's."""
    if abilities.changes_user:
        return 0
    if abilities.mode != "plain":
        return 2 if abilities.mode == "namespaces" else 1
    num = 0
    # all threads of this user
    for folder in Path("/proc").glob("[0-9]*/task"):
        try:
            num += len(os.listdir(folder)) if folder.stat().st_uid == os.getuid() else 0
        except OSError:
            continue
    return num
