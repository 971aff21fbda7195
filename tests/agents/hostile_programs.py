"""Programs that misbehave, each with what must come of it. Run as a command, it tries them as whoever started it.

python -m tests.agents.hostile_programs [mode]
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openkeye.agents import sandbox
from openkeye.agents.sandbox import Ended, Limits, Program, Sandbox, SandboxAbilities

LIMITS = Limits(wall_seconds=1.0, cpu_seconds=5.0, memory_bytes=128 << 20, output_bytes=10_000, num_processes=12)


@dataclass(frozen=True)
class Hostile:
    source: str
    is_expected: Callable[[Ended], bool]


PROGRAMS = {
    "hangs": Hostile("import time\ntime.sleep(8)", lambda ended: ended.limit == "wall" and ended.wall_seconds < 3),
    "spins": Hostile("while True: pass", lambda ended: ended.limit in ("wall", "cpu")),
    "forks": Hostile(
        """
import os, time
made = 0
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(8)
        made += 1
    except OSError:
        pass
print(made)
time.sleep(0.2)
""",
        # (a plain user's runs share one number, so that others' processes may leave none)
        lambda ended: 0 <= int(ended.stdout) <= 11,
    ),
    "forks of forks": Hostile(
        """
import os, time
for _ in range(8):
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
time.sleep(8)
""",
        lambda ended: ended.limit in ("wall", "memory"),
    ),
    "allocates 10 GB": Hostile("b = bytearray(10 << 30)", lambda ended: "MemoryError" in ended.stderr and ended.exit_code == 1),
    "allocates in many": Hostile(
        """
import os, time
for _ in range(4):
    if os.fork() == 0:
        b = b"x" * (60 << 20)
        time.sleep(8)
time.sleep(8)
""",
        lambda ended: ended.limit == "memory",
    ),
    "writes without end": Hostile(
        "import os\nwhile True: os.write(1, b'x' * 4096)",
        lambda ended: ended.limit == "output" and len(ended.stdout) == 10_000 and ended.wall_seconds < 1,
    ),
    "complains without end": Hostile(
        "import sys\nwhile True: sys.stderr.write('x' * 4096)", lambda ended: ended.limit == "output"
    ),
    "ignores signals": Hostile(
        """
import signal, time
for number in range(1, 32):
    if number not in (9, 19):
        signal.signal(number, signal.SIG_IGN)
time.sleep(8)
""",
        lambda ended: ended.limit == "wall",
    ),
    "becomes a daemon": Hostile(
        """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(3):
            os.close(number)
        time.sleep(8)
    os._exit(0)
os.wait()
time.sleep(0.1)
print("gone")
""",
        lambda ended: ended.is_success and ended.stdout == "gone\n",
    ),
    "leaves a child with its output": Hostile(
        "import os, time\nif os.fork() == 0: time.sleep(8)\nprint('left')",
        lambda ended: ended.is_success and ended.stdout == "left\n" and ended.wall_seconds < 0.9,
    ),
    "writes a large file": Hostile(
        "f = open('large', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", lambda ended: not ended.is_success
    ),
}
WALLED = {
    "calls the network": Hostile(
        """
import socket
for address in (("127.0.0.1", PORT), ("1.1.1.1", 53), ("8.8.8.8", 80)):
    try:
        socket.create_connection(address, 0.5)
        print("reached", address)
    except OSError as error:
        print(error.errno is not None)
""",
        lambda ended: ended.stdout == "True\nTrue\nTrue\n",
    ),
    "looks around": Hostile(
        """
import os
print(os.path.exists(HERE), [name for name in os.listdir("/proc") if name.isdigit()] == ["1", str(os.getpid())])
for path in ("/made", "/usr/made", "/bin/made", "/etc/made"):
    try:
        open(path, "w").close()
        print("wrote", path)
    except OSError:
        pass
""",
        lambda ended: ended.stdout.startswith("False True\n") and "wrote /usr" not in ended.stdout,
    ),
    "takes what nobody counts": Hostile(
        """
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.memfd_create("x")
    print("memfd")
except PermissionError:
    pass
print(libc.unshare(0x10000000), libc.shmget(0, 1 << 20, 0o1600), libc.ptrace(0, 0, 0, 0), libc.unshare(0x20000))
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
print(libc.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno())
print(libc.syscall(435, 0, 0), ctypes.get_errno())
thread = threading.Thread(target=print, args=("a thread",))
thread.start()
thread.join()
""",
        lambda ended: ended.stdout == "-1 -1 -1 -1\n-1 1\n-1 38\na thread\n",
    ),
    "carries something in or out": Hostile(
        """
import os, stat
print(sorted(os.environ))
print([name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")])
for kind in (stat.S_IFCHR, stat.S_IFBLK):
    try:
        os.mknod("device", 0o600 | kind, os.makedev(1, 1))
        print("a device")
    except PermissionError:
        pass
n = 0
try:
    for n in range(30_000):
        open(f"file{n}", "w").close()
except OSError:
    print(n < 20_000)
sockets = open("/proc/net/unix").readlines()[1:]
print(sockets, open("/proc/self/status").read().count("CapEff:\\t0000000000000000"))
""",
        lambda ended: (
            ended.stdout.startswith(
                "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'PYTHONDONTWRITEBYTECODE', 'PYTHONHASHSEED', 'TMPDIR']\n"
                "['0', '1', '2']\n"
            )
            and ended.stdout.endswith("[] 1\n")
            and "a device" not in ended.stdout
        ),
    ),
    "fills its folder": Hostile(
        """
n = 0
try:
    for n in range(400):
        open(f"file{n}", "wb").write(b"x" * (1 << 20))
except OSError:
    print(n)
""",
        lambda ended: 100 < int(ended.stdout) < 270,
    ),
    "kills the watcher": Hostile(
        """
import os
for number in range(1, 32):
    try:
        os.kill(1, number)
    except PermissionError:
        pass
for name in ("environ", "mem", "fd/0", "root/etc", "cwd"):
    try:
        os.open(f"/proc/1/{name}", os.O_RDONLY)
        print("opened", name)
    except OSError:
        pass
print("still here")
""",
        lambda ended: ended.is_success and ended.stdout == "still here\n",
    ),
}


def marked(source: str, port: int, mark: str) -> Program:
    """A program that is known among all processes by its arguments."""
    source = source.replace("PORT", str(port)).replace("HERE", repr(str(Path(sandbox.__file__))))
    return Program(("python", "-c", source, mark))


def processes_with(mark: str) -> list[str]:
    """Command lines of processes that hold a mark; in namespaces or not, the host sees all."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words:
            found.append(str(path))
    return found


async def try_program(name: str, hostile: Hostile) -> Ended:
    """Run one and check that nothing of it is left."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    mark = f"mark-{time.monotonic_ns()}"
    try:
        program = marked(hostile.source, server.sockets[0].getsockname()[1], mark)
        ended = await Sandbox(LIMITS, allow_network=sandbox._found[:1] == [PLAIN]).run(program)
    finally:
        server.close()
    left = processes_with(mark)
    assert not left, f"{name}: left {left}"
    assert hostile.is_expected(ended), f"{name}: {ended}"
    return ended


PLAIN = SandboxAbilities("plain", changes_user=os.geteuid() == 0, has_proc=True)


async def try_all(mode: str) -> None:
    if mode:
        sandbox._found[:] = [SandboxAbilities(mode, changes_user=False, has_proc=True)]
    abilities = await sandbox.find_abilities()
    print(abilities)
    programs = {**PROGRAMS, **(WALLED if abilities.has_no_network else {})}
    for name, ended in zip(programs, await asyncio.gather(*(try_program(*item) for item in programs.items())), strict=True):
        print(f"{name}: {ended.limit} {ended.exit_code} {ended.wall_seconds:.2f}")


if __name__ == "__main__":
    asyncio.run(try_all(sys.argv[1] if len(sys.argv) > 1 else ""))
