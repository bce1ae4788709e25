"""The phone's file system, a folder of this machine, and the place where its commands run.

On Linux with user namespaces (or as root) commands run isolated: the folder is their `/`, most of it read-only, with
this machine's programs and libraries beside it; they see only the phone's processes, and the kernel ends all of them
with the phone. Elsewhere they run in plain sight: absolute Android paths in a command, and the folder's name in what is
printed, are rewritten. A script on the phone that names absolute paths works only where it is isolated.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import psutil

from device_agents.simulated_phone import toolbox
from device_agents.simulated_phone.phone import TOOLS, Phone
from lut_db.errors import LatencyLabError

TMP = "/data/local/tmp"
SEARCH_PATH = "/product/bin:/system/bin:/system/xbin:/vendor/bin"
WRITABLE = (TMP, "/storage/emulated/0")
HOST_PATH = "/usr/bin:/bin"
HERE = str(Path(__file__).resolve().parents[2])
"""The folder that holds this package."""
START_S = 20.0
LINKS_AT_MOST = 40
LEFT_ALONE_S = 2.0
BORROWED = """
[ awk base64 basename bc bzip2 cat chmod chown cksum cmp comm cp cut date dd dirname du echo egrep env expr false fgrep
file find fold getconf grep groups gunzip gzip head kill ln ls md5sum mkdir mkfifo mknod mktemp more mv nice nl nohup od
paste patch printenv printf pwd readlink realpath renice rm rmdir sed seq setsid sha1sum sha224sum sha256sum sha384sum
sha512sum sleep sort split stat stdbuf strings stty sync tac tail tar tee test timeout touch tr true truncate tty uniq
uptime wc which xargs xxd yes zcat
"""
BORROWED_IF_ISOLATED = ("pgrep", "pkill", "pidof")
ANDROID_PATH = re.compile(r"(?<![\w./$}~-])/(?=(?:data|sdcard|storage|system|vendor|product|sys|mnt)(?:/|\b))")

MOUNT_SCRIPT = """
set -e
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
for path in data storage dev $MORE; do mount --bind "$root/$path" "$root/$path"; done
for path in "$@"; do mkdir -p "$root$path"; mount --rbind "$path" "$root$path"; done
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/pts"
mount --rbind /dev/pts "$root/dev/pts"
for node in null zero full random urandom tty; do
  : >> "$root/dev/$node"
  mount --bind "/dev/$node" "$root/dev/$node"
done
mount -o remount,ro,bind "$root"
exec chroot "$root" "$PYTHON" -I -S /system/bin/toolbox.py init
"""

_log = logging.getLogger(__name__)


class NotIsolated(LatencyLabError):
    """Commands cannot be isolated on this machine; the message says why."""


class Sandbox:
    """A folder that is a phone's file system. `programs` are the paths of the programs that run models."""

    def __init__(self, root: Path, phone: Phone, programs: dict[str, str], isolate: bool | None) -> None:
        self.root = root.resolve()
        self.phone = phone
        self.programs = programs
        self.isolate = isolate
        self.isolated = False
        self.running: set[asyncio.subprocess.Process] = set()
        self._init: asyncio.subprocess.Process | None = None
        self._enter: list[str] = []
        self._written: dict[str, str] = {}
        self._pace = b""
        self._build()

    # --- files -------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        for folder in (
            "data/local/tmp", "data/misc/adb", "data/app", "storage/emulated/0/Download", "system/bin", "system/etc",
            "vendor/bin", "product/bin", "proc", "dev/socket", "sys", "mnt",
        ):  # fmt: skip
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for link, target in (("sdcard", "storage/emulated/0"), ("etc", "system/etc"), ("bin", "system/bin")):
            self._link(link, target)
        for library in ("lib", "lib64", "lib32"):
            if Path(f"/{library}").is_symlink():
                self._link(library, os.readlink(f"/{library}"))
        etc = self.root / "system/etc"
        (etc / "passwd").write_text("root:x:0:0::/:/system/bin/sh\nshell:x:2000:2000::/:/system/bin/sh\n")
        (etc / "group").write_text("root:x:0:\nshell:x:2000:\n")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        properties = sorted(self.phone.props.items())
        (self.root / "system/build.prop").write_text("".join(f"{name}={value}\n" for name, value in properties))
        shutil.copyfile(toolbox.__file__, self.root / "system/bin/toolbox.py")
        python = os.path.realpath(sys.executable)
        for name in (*TOOLS, *toolbox.NAMES):
            self._script(f"/system/bin/{name}", f'exec {python} -I -S "$PHONE_ROOT/system/bin/toolbox.py" {name} "$@"')
        for name, path in self.programs.items():
            module = "device_agents.simulated_phone.programs"
            # This very code runs there, whether it is installed or not.
            self._script(path, f'PYTHONPATH={shlex.quote(HERE)} exec {sys.executable} -m {module} {name} "$@"')
            if path != f"/system/bin/{name}":
                self._link(f"system/bin/{name}", os.path.relpath(path, "/system/bin"))
        for name in ("sh", *BORROWED.split(), *BORROWED_IF_ISOLATED):
            found = shutil.which("dash" if name == "sh" else name, path=HOST_PATH) or shutil.which(name, path=HOST_PATH)
            if found:
                self._link(f"system/bin/{name}", found)
        self.refresh()

    def _link(self, link: str, target: str) -> None:
        path = self.root / link
        if not path.is_symlink():
            path.symlink_to(target)

    def _script(self, path: str, line: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def refresh(self) -> None:
        """Brings the files that follow the phone's state up to now, and takes up what was written to governors."""
        for core in range(self.phone.identity.cores):
            governor = self.root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
            if governor.exists():
                self.phone.governors[core] = governor.read_text().strip() or self.phone.governors[core]
            else:
                governor.parent.mkdir(parents=True, exist_ok=True)
                governor.write_text(self.phone.governors[core] + "\n")
        self.phone.warm()
        for name, text in self.phone.system_files().items():
            if self._written.get(name) != text:
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = path.with_name(f".{path.name}")
                fresh.write_text(text)
                fresh.replace(path)  # at once: somebody may be reading
                self._written[name] = text
        pace = f"{self.phone.pace():.9f}".encode().ljust(toolbox.PACE_BYTES)[: toolbox.PACE_BYTES]
        if pace != self._pace:
            # In place and of one length: programs that run keep it open.
            file = os.open(self.root / "dev/pace", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, pace, 0)
            finally:
                os.close(file)
            self._pace = pace

    def resolve(self, path: str, *, follow: bool = True) -> Path:
        """Where an absolute path of the phone lies on this machine. Neither `..` nor a link leads out of the folder.

        `follow` says whether a link in the last place is followed. Raises OSError for links in a circle.
        """
        pending = [part for part in path.split("/") if part]
        done: list[str] = []
        links = 0
        while pending:
            part = pending.pop(0)
            if part in (".", ".."):
                done = done[:-1] if part == ".." else done
                continue
            here = self.root.joinpath(*done, part)
            if here.is_symlink() and (pending or follow):
                links += 1
                if links > LINKS_AT_MOST:
                    raise OSError(40, os.strerror(40), path)
                target = os.readlink(here)
                done = [] if target.startswith("/") else done
                pending = [piece for piece in target.split("/") if piece] + pending
                continue
            done.append(part)
        return self.root.joinpath(*done)

    def inside(self, path: Path) -> str:
        """The phone's name of a resolved path."""
        return "/" + path.relative_to(self.root).as_posix() if path != self.root else "/"

    def check_writable(self, path: Path) -> None:
        """Raises OSError where the shell user may not write: outside /data/local/tmp and shared storage."""
        name = self.inside(path)
        if not any(name == place or name.startswith(place + "/") for place in WRITABLE):
            number = 13 if name.startswith("/data") else 30
            raise OSError(number, os.strerror(number), name)

    # --- processes ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Makes the place where commands run. Raises NotIsolated where isolation is demanded and not to be had."""
        if self.isolate is not False:
            try:
                await self._isolate()
            except (NotIsolated, OSError) as error:
                if self.isolate:
                    raise
                _log.warning("commands run in plain sight: %s", error)
        if not self.isolated:
            for name in BORROWED_IF_ISOLATED:  # they would find this machine's processes
                (self.root / "system/bin" / name).unlink(missing_ok=True)

    async def _isolate(self) -> None:
        unshare, nsenter = shutil.which("unshare"), shutil.which("nsenter")
        if unshare is None or nsenter is None:
            raise NotIsolated("util-linux's unshare and nsenter are missing")
        reasons = []
        for user in (True, False) if os.geteuid() == 0 else (True,):
            namespaces = (["--user", "--map-root-user"] if user else []) + ["--mount", "--pid"]
            process = await asyncio.create_subprocess_exec(
                unshare, *namespaces, "--fork", "--kill-child", "/bin/sh", "-c", MOUNT_SCRIPT, "sh", str(self.root),
                *self._borrowed_folders(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "PYTHON": os.path.realpath(sys.executable),
                    "MORE": "sys" if self.phone.identity.rooted else "",
                },
            )  # fmt: skip
            assert process.stdout is not None
            try:
                line = await asyncio.wait_for(process.stdout.readline(), START_S)
            except TimeoutError:
                line = b""
            children = psutil.Process(process.pid).children() if line == b"ready\n" else []
            if children:
                self._init = process
                enter = [nsenter, "--target", str(children[0].pid), "--mount", "--pid", "--root", "--wd"]
                self._enter = [*enter, *(["--user", "--preserve-credentials"] if user else []), "--"]
                self.isolated = True
                return
            if process.returncode is None:
                process.kill()
            _, errors = await process.communicate()
            reasons.append(errors.decode(errors="replace").strip() or "no answer")
        raise NotIsolated("; ".join(reasons))

    def _borrowed_folders(self) -> list[str]:
        """Folders of this machine that programs on the phone need: the interpreter, its packages, libraries."""
        packages = [str(Path(path).resolve()) for path in sys.path if path and Path(path).is_dir()]
        wanted = ["/usr", sys.prefix, sys.base_prefix, HERE, *packages]
        wanted += [f"/{name}" for name in ("lib", "lib64", "lib32") if Path(f"/{name}").is_dir()]
        found: list[str] = []
        for path in sorted(set(wanted), key=len):
            if not Path(path).is_symlink() and not any(path == one or path.startswith(one + "/") for one in found):
                found.append(path)
        return found

    def _environment(self) -> dict[str, str]:
        prefix = "" if self.isolated else str(self.root)
        identity = self.phone.identity
        described = {
            "cores": identity.cores, "little_cores": identity.little_cores, "storage_kib": identity.storage_mib * 1024,
            "khz": [identity.max_khz(core) for core in range(identity.cores)],
        }  # fmt: skip
        search = ":".join(prefix + folder for folder in SEARCH_PATH.split(":"))
        return {
            "ANDROID_DATA": f"{prefix}/data", "ANDROID_ROOT": f"{prefix}/system",
            "EXTERNAL_STORAGE": f"{prefix}/sdcard",
            "HOME": prefix or "/", "HOSTNAME": identity.device, "LOGNAME": "shell", "USER": "shell", "TERM": "dumb",
            "PATH": search if self.isolated else f"{search}:{HOST_PATH}", "SHELL": f"{prefix}/system/bin/sh",
            "TMPDIR": f"{prefix}{TMP}", "PHONE_ROOT": prefix, toolbox.DEV: f"{prefix}/dev",
            toolbox.PHONE: json.dumps(described),
        }  # fmt: skip

    async def spawn(
        self, command: str, *, separate_errors: bool, terminal: int | None = None
    ) -> asyncio.subprocess.Process:
        """Runs a command by the phone's shell; an empty one is the shell itself. It leads a process group of its own.

        `terminal` is the inner end of a pseudo-terminal, in place of pipes.
        """
        shell = ["/system/bin/sh"] if self.isolated else ["/bin/sh"]
        if command:
            shell += ["-c", command if self.isolated else ANDROID_PATH.sub(f"{self.root}/", command)]
        process = await asyncio.create_subprocess_exec(
            *self._enter, *shell,
            stdin=subprocess.PIPE if terminal is None else terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=terminal if terminal is not None else subprocess.PIPE if separate_errors else subprocess.STDOUT,
            start_new_session=True, env=self._environment(), cwd=None if self.isolated else self.root,
            preexec_fn=None if terminal is None else _take_terminal,
        )  # fmt: skip
        self.running = {other for other in self.running if other.returncode is None} | {process}
        return process

    async def hang_up(self, process: asyncio.subprocess.Process) -> None:
        """Sends SIGHUP to a command's process group, as a terminal does. A command that ignores it runs on."""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGHUP)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LEFT_ALONE_S)

    def let_go(self, process: asyncio.subprocess.Process) -> None:
        """Nobody reads what a command prints any longer: its next word is a SIGPIPE."""
        for output in (process.stdout, process.stderr):
            if output is not None:
                output._transport.close()  # type: ignore[attr-defined]
        if process.returncode is not None:
            self.running.discard(process)

    async def stop(self) -> None:
        """Ends everything that runs on the phone."""
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if self._init is not None:
            assert self._init.stdin is not None
            self._init.stdin.close()
            await self._init.wait()
            self._init = None
        for process in list(self.running):
            await process.wait()
        self.running.clear()
        self.isolated = False
        self._enter = []

    def eraser(self) -> Callable[[bytes, bool], bytes]:
        """A filter for what a command prints: (bytes, whether they are the last) to bytes."""
        if self.isolated:
            return lambda data, last: data
        name = os.fsencode(self.root)
        held = b""

        def erase(data: bytes, last: bool) -> bytes:
            nonlocal held
            data = (held + data).replace(name + b"/", b"/")
            # What may be the beginning of the name waits for the rest; alone it is the root.
            keep = 0 if last else next(size for size in range(len(name), -1, -1) if data.endswith(name[:size]))
            shown, held = data[: len(data) - keep], data[len(data) - keep :]
            return shown.replace(name, b"/")

        return erase


def _take_terminal() -> None:
    """In a fresh session: makes standard input its terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
