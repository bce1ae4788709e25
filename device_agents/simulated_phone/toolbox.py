"""Small commands on the phone: `python toolbox.py NAME ARGUMENTS…`. A copy of this file lies in its /system/bin.

Nothing but the standard library: every call starts an interpreter. `ps`, `df`, `taskset` and `nproc` are answered
here, all others by the phone over its socket. `init` is the first process of an isolated phone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

AFFINITY = "PHONE_AFFINITY"
DEV = "PHONE_DEV"
PHONE = "PHONE"
PACE_BYTES = 16
"""Of the file that tells programs how slow the phone is."""


def describe() -> dict[str, Any]:
    """What the shell was told of the phone: `cores`, `little_cores`, `storage_kib`."""
    found: dict[str, Any] = json.loads(os.environ[PHONE])
    return found


def connect() -> socket.socket:
    """A connection to the phone. Its path may be longer than the address of a socket: reached through its folder."""
    folder = os.open(os.path.join(os.environ[DEV], "socket"), os.O_PATH | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"/proc/self/fd/{folder}/phone")
    finally:
        os.close(folder)
    return connection


def ask(connection: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
    """One line of JSON each way."""
    connection.sendall(json.dumps(request).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the phone is gone")
        answer += part
    found: dict[str, Any] = json.loads(answer)
    return found


def own_cores() -> list[int]:
    """The phone's cores that this process may use."""
    mask = int(os.environ.get(AFFINITY, "0"), 16) or (1 << describe()["cores"]) - 1
    return [core for core in range(describe()["cores"]) if mask >> core & 1]


def _taskset(arguments: list[str]) -> int:
    full = (1 << describe()["cores"]) - 1
    if len(arguments) == 2 and arguments[0] == "-p":
        try:
            pairs = Path(f"/proc/{int(arguments[1])}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            print(f"taskset: sched_getaffinity: No such process {arguments[1]}", file=sys.stderr)
            return 1
        masks = [pair.partition(b"=")[2].decode() for pair in pairs if pair.startswith(AFFINITY.encode() + b"=")]
        print(f"pid {arguments[1]}'s current affinity mask: {int(masks[0], 16) if masks else full:x}")
        return 0
    if len(arguments) < 2:
        print("usage: taskset [-ap] [mask] [PID | cmd [args...]]", file=sys.stderr)
        return 1
    try:
        mask = int(arguments[0], 16)
    except ValueError:
        print(f"taskset: bad mask '{arguments[0]}'", file=sys.stderr)
        return 1
    if not mask & full:
        print(f"taskset: sched_setaffinity {arguments[0]}: Invalid argument", file=sys.stderr)
        return 1
    # Cores of the phone share those of this machine in turn.
    real = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {real[core % len(real)] for core in range(describe()["cores"]) if mask >> core & 1})
    os.environ[AFFINITY] = f"{mask & full:x}"
    try:
        os.execvp(arguments[1], arguments[1:])
    except OSError as error:
        print(f"taskset: exec {arguments[1]}: {error.strerror}", file=sys.stderr)
    return 127


def _ps(arguments: list[str]) -> int:
    fields = {"PID": 7, "PPID": 7, "USER": 14, "RSS": 8, "S": 1, "NAME": 0, "ARGS": 0, "CMD": 0}
    columns = ["USER", "PID", "PPID", "RSS", "S", "NAME"]
    wanted: set[int] | None = None
    every = False
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if option in ("-A", "-e", "-ef", "-f", "-Af"):
            every = every or option != "-f"
            columns = columns if "f" not in option else ["USER", "PID", "PPID", "CMD"]
        elif option == "-o" and rest:
            columns = [column.split("=")[0].upper() for column in rest.pop(0).split(",")]
        elif option == "-p" and rest:
            wanted = {int(pid) for pid in rest.pop(0).split(",")}
        else:
            print(f"ps: Unknown option '{option}'", file=sys.stderr)
            return 1
    if unknown := [column for column in columns if column not in fields]:
        print(f"ps: bad -o {unknown[0]}", file=sys.stderr)
        return 1
    rows = []
    isolated = not os.environ.get("PHONE_ROOT")
    marker = f"{DEV}={os.environ[DEV]}".encode()
    for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            ours = (entry == 1 and isolated) or marker in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        if not ours or (wanted is not None and entry not in wanted):
            continue
        name, _, after = stat.partition(" (")[2].rpartition(") ")
        state, parent, *numbers = after.split()
        line = b" ".join(words).decode(errors="replace").strip() or f"[{name}]"
        rows.append({
            "PID": str(entry), "PPID": parent, "USER": "root" if entry == 1 else "shell", "S": state, "NAME": name,
            "RSS": str(int(numbers[19]) * os.sysconf("SC_PAGE_SIZE") // 1024), "ARGS": line, "CMD": line,
        })  # fmt: skip
    for row in [{column: column for column in fields}, *rows]:
        print(" ".join(row[column].rjust(fields[column]) if column != "USER" else row[column].ljust(fields[column])
                       for column in columns).rstrip())  # fmt: skip
    return 0 if rows or every else 1


def _df(arguments: list[str]) -> int:
    if unknown := [option for option in arguments if option.startswith("-") and option not in ("-k", "-h")]:
        print(f"df: Unknown option '{unknown[0]}'", file=sys.stderr)
        return 1
    root = os.environ.get("PHONE_ROOT", "")
    used = 0
    for folder, _, names in os.walk(f"{root}/data"):
        for name in names:
            try:
                used += os.lstat(os.path.join(folder, name)).st_blocks // 2
            except FileNotFoundError:
                continue  # removed meanwhile
    total = int(describe()["storage_kib"])
    paths = [path for path in arguments if not path.startswith("-")]
    missing = [path for path in paths if not os.path.exists(path)]
    for path in missing:
        print(f"df: {path}: No such file or directory", file=sys.stderr)
    lines = {"/": ("/dev/block/dm-9", 849028, 846440, 0), "/data": ("/dev/block/dm-58", total, used, total - used)}
    shown = {"/data" if path.removeprefix(root).startswith(("/data", "/sdcard", "/storage")) else "/"
             for path in paths if path not in missing} if paths else set(lines)  # fmt: skip
    print("Filesystem      1K-blocks     Used Available Use% Mounted on")
    for mount in sorted(shown):
        device, size, taken, free = lines[mount]
        print(f"{device:<15} {size:>9} {taken:>8} {max(0, free):>9} {round(100 * taken / size):>3}% {mount}")
    return 1 if missing else 0


def _init() -> NoReturn:
    """Reaps whoever is left alone. Ends, and with it everything on the phone, when the phone closes its end."""
    read, write = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([0, read], [], [])
        if 0 in ready and not os.read(0, 4096):
            os._exit(0)
        if read in ready:
            os.read(read, 4096)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def main(name: str, arguments: list[str]) -> int:
    if name == "init":
        _init()
    if name == "nproc":
        print(len(own_cores()))
        return 0
    if name in LOCAL:
        return LOCAL[name](arguments)
    with connect() as connection:
        answer = ask(connection, {"tool": [name, *arguments]})
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    return int(answer["code"])


LOCAL = {"taskset": _taskset, "ps": _ps, "df": _df}
NAMES = (*LOCAL, "nproc")

if __name__ == "__main__":
    try:
        code = main(sys.argv[1], sys.argv[2:])
        sys.stdout.flush()
    except (BrokenPipeError, ConnectionError) as error:
        os._exit(1 if isinstance(error, BrokenPipeError) else 255)
    sys.exit(code)
