"""The process beside an untrusted program: walls it in, watches its limits, and leaves nothing of it behind.

`sandbox.py` starts it by path, with the standard library alone; it imports nothing of ours. A byte on its input says that an
order in JSON lies in a file that it was given, and it writes one answer in JSON. Its input stays open as a lifeline: at its end
everything dies.

With namespaces, a first process makes them and waits; the second is process 1 of a new process namespace, in which the kernel
kills everybody when process 1 ends. Its root is an empty file system in memory with the system's programs bound in, read-only,
so that neither the project nor anybody's files are there. The third becomes the program.
"""

import base64
import contextlib
import ctypes
import errno
import json
import math
import os
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
SYSCALL_MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
# the same number on every architecture
ATTRIBUTE_READ_ONLY, ATTRIBUTE_NO_SETUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NEW_ROOT = "/proc"
# A folder that every Linux has; the new root is mounted over it, where only this process sees it.
TICK_SECONDS = 0.02
MAX_INODES = 20_000
DEVICES = ("null", "zero", "full", "random", "urandom")
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_ALLOW, SECCOMP_ERROR = 22, 2, 0x7FFF0000, 0x50000
LOAD, JUMP_IF_EQUAL, JUMP_IF_LEAST, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# instructions of the kernel's filters
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
# offsets of what a filter looks at
REFUSED_CALLS = {
    "x86_64": (0xC000003E, 56, (319, 447, 29, 68, 64, 240, 272, 308, 101, 310, 311, 165, 250, 248, 249, 321, 298, 323, 425)),
    "aarch64": (0xC00000B7, 220, (279, 447, 194, 186, 190, 180, 97, 268, 117, 270, 271, 40, 219, 217, 218, 280, 241, 282, 425)),
}
# Architecture, clone, and: memfd_create, memfd_secret, shmget, msgget, semget, mq_open, unshare, setns, ptrace,
# process_vm_readv, process_vm_writev, mount, keyctl, add_key, request_key, bpf, perf_event_open, userfaultfd, io_uring_setup.
SYSCALL_CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """OSError of the last call of libc, if it failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    check(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def bind_read_only(path: str) -> None:
    """The host's file or folder at the same place of the new root."""
    target = NEW_ROOT + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(path, target, None, MS_BIND | MS_REC)
    attributes = ctypes.create_string_buffer(struct.pack("4Q", ATTRIBUTE_READ_ONLY | ATTRIBUTE_NO_SETUID, 0, 0, 0), 32)
    size = ctypes.c_size_t(32)
    check(libc.syscall(SYSCALL_MOUNT_SETATTR, 0, target.encode(), AT_RECURSIVE, attributes, size), f"make {path} read-only")


def build_root(order: dict[str, Any]) -> None:
    """Go into a new root in memory: programs and libraries read-only, /box and /tmp to write to, own /proc, few devices."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    size = f"size={order['folder_bytes']},nr_inodes={MAX_INODES},mode=755"
    mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in order["readable"]:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(NEW_ROOT + path), exist_ok=True)
            os.symlink(os.readlink(path), NEW_ROOT + path)
        elif os.path.exists(path):
            bind_read_only(path)
    for path in order["hidden"]:
        if os.path.isdir(NEW_ROOT + path):
            mount("tmpfs", NEW_ROOT + path, "tmpfs", MS_NOSUID | MS_NODEV, "size=4096,mode=755")
    os.makedirs(NEW_ROOT + "/dev/shm")
    for name in DEVICES:
        open(f"{NEW_ROOT}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{NEW_ROOT}/dev/{name}", None, MS_BIND)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{NEW_ROOT}/dev/{name}")
    os.symlink("/proc/self/fd", NEW_ROOT + "/dev/fd")
    for name in ("/proc", "/tmp", "/box"):
        os.makedirs(NEW_ROOT + name)
    for name in ("/tmp", "/dev/shm"):
        os.chmod(NEW_ROOT + name, 0o1777)
    if order["has_proc"]:
        mount("proc", NEW_ROOT + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chroot(NEW_ROOT)
    os.chdir("/")


def write_files(order: dict[str, Any], folder: str) -> None:
    uid = order["uid"]
    made = {folder}
    for name, content in order["files"].items():
        path = os.path.join(folder, name)
        parent = os.path.dirname(path)
        while parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
            parent = os.path.dirname(parent)
        with open(path, "wb") as file:
            file.write(base64.b64decode(content))
        os.chmod(path, 0o755)
        if uid is not None:
            os.chown(path, uid, uid)
    for path in made:
        os.chmod(path, 0o700)
        if uid is not None:
            os.chown(path, uid, uid)


def read_outputs(names: list[str], folder: str, max_bytes: int) -> dict[str, str]:
    """Files that the program left; what leads out of its folder, is no plain file or is too large counts as missing."""
    found = {}
    for name in names:
        path = os.path.realpath(os.path.join(folder, name))
        if not path.startswith(os.path.realpath(folder) + "/"):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            continue
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
                found[name] = base64.b64encode(file.read()).decode()
    return found


def become_program(order: dict[str, Any], folder: str, stdin: int, stdout: int, stderr: int) -> None:
    """Limits, then another user, then the program itself. Returns only by leaving."""
    try:
        os.setsid()
        for number, source in enumerate((stdin, stdout, stderr)):
            os.dup2(source, number)
        os.closerange(3, 1 << 16)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        if os.path.exists("/proc/self/oom_score_adj"):
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        cpu = math.ceil(order["cpu_seconds"])
        # the kernel counts whole seconds, of each process
        for name, low, high in (
            ("CPU", cpu, cpu + 1),
            ("AS", order["address_bytes"], order["address_bytes"]),
            ("FSIZE", order["file_bytes"], order["file_bytes"]),
            ("NOFILE", 256, 256),
            ("CORE", 0, 0),
        ):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (low, high))
        if order["uid"] is not None:
            os.setgroups([])
            os.setresgid(order["uid"], order["uid"], order["uid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])
        # After the change of user: it is users that processes are counted by.
        resource.setrlimit(resource.RLIMIT_NPROC, (order["max_user_processes"], order["max_user_processes"]))
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        os.execve(order["command"][0], order["command"], order["variables"])
    except OSError as error:
        os.write(2, f"{order['command'][0]}: {error.strerror}\n".encode())
    os._exit(127)


def refuse_calls() -> None:
    """From here on the kernel refuses calls that take memory which no limit counts (files and segments in memory, tmpfs of a
    namespace of the program's own), that look into other processes, or that have often been the way out of walls.

    Elsewhere than on x86-64 and 64-bit ARM nothing is refused.
    """
    if os.uname().machine not in REFUSED_CALLS:
        return
    architecture, clone, refused = REFUSED_CALLS[os.uname().machine]
    refuse = (RETURN, 0, 0, SECCOMP_ERROR | errno.EPERM)
    rows = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 1, 0, architecture), refuse, (LOAD, 0, 0, NUMBER)]
    # Above lie the numbers of a second way to call on x86-64.
    rows += [(JUMP_IF_LEAST, 0, 1, 0x40000000), refuse]
    for number in refused:
        rows += [(JUMP_IF_EQUAL, 0, 1, number), refuse]
    # Its flags lie in memory, where no filter sees them; C libraries then take clone.
    rows += [(JUMP_IF_EQUAL, 0, 1, SYSCALL_CLONE3), (RETURN, 0, 0, SECCOMP_ERROR | errno.ENOSYS)]
    rows += [(JUMP_IF_EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (JUMP_IF_SET, 0, 1, CLONE_NEWUSER), refuse]
    rows.append((RETURN, 0, 0, SECCOMP_ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rows), ctypes.addressof(code)))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up new privileges")
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "refuse calls")


class Watch:
    """What the processes of a program use, from /proc: of the whole process namespace, or of this process's descendants."""

    def __init__(self, owns_namespace: bool, has_proc: bool) -> None:
        self.owns_namespace = owns_namespace
        self.has_proc = has_proc
        self.page_bytes = resource.getpagesize()
        self.ticks = os.sysconf("SC_CLK_TCK")
        self.own = os.getpid()

    def processes(self) -> dict[int, list[bytes]]:
        """Fields of /proc/N/stat behind the name, by process."""
        found: dict[int, list[bytes]] = {}
        if not self.has_proc:
            return found
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == self.own:
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found[int(name)] = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
        if self.owns_namespace:
            return found
        mine, grew = {self.own}, True
        while grew:
            more = {number for number, fields in found.items() if int(fields[1]) in mine} - mine
            mine |= more
            grew = bool(more)
        return {number: found[number] for number in mine if number != self.own}

    def usage(self) -> tuple[float, int]:
        """(CPU seconds of living and reaped processes, resident bytes)"""
        seconds, resident = self.ended_seconds(), 0
        for fields in self.processes().values():
            seconds += sum(map(int, fields[11:15])) / self.ticks
            resident += int(fields[21]) * self.page_bytes
        return seconds, resident

    def ended_seconds(self) -> float:
        """CPU seconds of reaped processes."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def kill_all(self) -> None:
        """SIGKILL for everybody but this process, until nobody is left."""
        while True:
            if self.owns_namespace:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                for number in self.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.001)


class Pipe:
    """What the program says on one stream, kept up to a limit."""

    def __init__(self, max_bytes: int) -> None:
        self.source, self.target = os.pipe()
        os.set_blocking(self.source, False)
        self.max_bytes = max_bytes
        self.content = bytearray()
        self.is_open = True
        self.is_over = False

    def read(self) -> None:
        """All that is there now."""
        while self.is_open and not self.is_over:
            try:
                piece = os.read(self.source, 1 << 16)
            except BlockingIOError:
                return
            self.is_open = bool(piece)
            self.content += piece
            self.is_over = len(self.content) > self.max_bytes
        del self.content[self.max_bytes :]


def reap(program: int) -> tuple[int, int] | None:
    """Bury whoever ended; (status, peak resident bytes) of the program if it is among them."""
    found = None
    while True:
        try:
            number, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if number == 0:
            return found
        if number == program:
            found = (status, used.ru_maxrss * 1024)


def passed_limit(order: dict[str, Any], pipes: tuple[Pipe, Pipe], seconds: float, cpu: float, resident: int) -> str | None:
    """The limit that a program still running has passed."""
    if any(pipe.is_over for pipe in pipes):
        return "output"
    if resident > order["memory_bytes"]:
        return "memory"
    if cpu > order["cpu_seconds"]:
        return "cpu"
    return "wall" if seconds > order["wall_seconds"] else None


def watch(order: dict[str, Any], program: int, pipes: tuple[Pipe, Pipe], usage: Watch) -> dict[str, Any]:
    """Until the program ends or passes a limit: how it ended, and what it took."""
    began = looked = time.monotonic()
    parent = os.getppid()
    descriptor = os.pidfd_open(program)
    poll = select.poll()
    poll.register(0, select.POLLHUP)
    poll.register(descriptor, select.POLLIN)
    for pipe in pipes:
        poll.register(pipe.source, select.POLLIN)
    limit, most_bytes, cpu, resident, ended = None, 0, 0.0, 0, None
    while limit is None and ended is None:
        events = dict(poll.poll(TICK_SECONDS * 1000))
        # Where a process that was forked meanwhile holds the other end, the lifeline outlives the parent.
        if 0 in events or os.getppid() != parent:
            usage.kill_all()
            if order["mode"] == "plain":
                shutil.rmtree(order["folder"], ignore_errors=True)
            os._exit(1)
        for pipe in pipes:
            pipe.read()
            if not pipe.is_open and pipe.source in events:
                poll.unregister(pipe.source)
        now = time.monotonic()
        if now - looked > TICK_SECONDS:
            looked = now
            cpu, resident = usage.usage()
            most_bytes = max(most_bytes, resident)
        ended = reap(program)
        if ended is None:
            limit = passed_limit(order, pipes, now - began, cpu, resident)
    if ended is None:
        os.kill(program, signal.SIGKILL)
        _, status, used = os.wait4(program, 0)
        ended = (status, used.ru_maxrss * 1024)
    seconds = time.monotonic() - began
    usage.kill_all()
    for pipe in pipes:
        pipe.read()
    exit_code = os.waitstatus_to_exitcode(ended[0])
    if limit is None:
        by_signal = {-signal.SIGXCPU: "cpu", -signal.SIGXFSZ: "file"}
        limit = "output" if any(pipe.is_over for pipe in pipes) else by_signal.get(exit_code)
    return {
        "exit_code": exit_code,
        "limit": limit,
        "wall_seconds": seconds,
        "cpu_seconds": max(cpu, usage.ended_seconds()),
        "memory_bytes": max(most_bytes, ended[1]),
        "stdout": base64.b64encode(pipes[0].content).decode(),
        "stderr": base64.b64encode(pipes[1].content).decode(),
    }


def supervise(order: dict[str, Any]) -> dict[str, Any]:
    """Run the program and answer with its end."""
    os.umask(0o022)
    owns_namespace = order["mode"] != "plain"
    if order["mode"] == "namespaces":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        build_root(order)
    elif not owns_namespace:
        check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "become the parent of orphans")
    # The program may be the same user: it must not look into this process, and a signal that Python handles would end it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "hide from the program")
    folder = order["folder"]
    write_files(order, folder)
    stdin = os.memfd_create("stdin")
    with open(stdin, "wb", closefd=False) as file:
        file.write(base64.b64decode(order["stdin"]))
    os.lseek(stdin, 0, os.SEEK_SET)
    pipes = (Pipe(order["output_bytes"]), Pipe(order["output_bytes"]))
    refuse_calls()
    program = os.fork()
    if program == 0:
        become_program(order, folder, stdin, pipes[0].target, pipes[1].target)
    for pipe in pipes:
        os.close(pipe.target)
    answer = watch(order, program, pipes, Watch(owns_namespace, os.path.exists("/proc/self/stat")))
    answer["files"] = read_outputs(order["outputs"], folder, order["file_bytes"])
    return answer


def enter_namespaces(order: dict[str, Any]) -> None:
    """New mounts, processes, messages and (unless allowed) network; as a plain user, inside a user namespace of its own."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC
    if not order["allow_network"]:
        flags |= CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    if order["uid"] is None:
        flags |= CLONE_NEWUSER
    check(libc.unshare(flags), "unshare")
    if order["uid"] is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def main() -> None:
    if not os.read(0, 1):
        sys.exit("there was no order")
    with open(int(sys.argv[1]), "rb") as file:
        file.seek(0)
        order = json.load(file)
    if order["mode"] == "namespaces":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        enter_namespaces(order)
        first = os.fork()
        if first != 0:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) != 0)
    answer = json.dumps(supervise(order)).encode()
    while answer:
        answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    main()
