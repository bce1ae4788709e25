"""One phone over ADB, by TCP or USB: commands with exit codes, files pushed once, one user of the phone at a time.

ADB itself tells no exit code, kills nothing when a connection ends and checks nothing that it pushes. So a command runs
in a shell that leaves its process number in a file and ends its output with a word nobody else can say and the exit
code; what is found to run when a connection is made is left over from a lost one, and killed; a file is pushed under
another name, compared by size and SHA-256, and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import secrets
import shlex
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adb_shell import exceptions
from adb_shell.adb_device import AdbDevice, AdbDeviceUsb
from adb_shell.auth.keygen import keygen
from adb_shell.auth.sign_pythonrsa import PythonRSASigner
from adb_shell.transport.base_transport import BaseTransport

from device_agents.backends import Unreachable
from lut_db.errors import InvalidInput

try:
    import usb1
except (ImportError, OSError):  # without the system's libusb there are phones on the network
    _USB_ERRORS: tuple[type[Exception], ...] = ()
    _USB_TIMEOUTS: tuple[type[Exception], ...] = ()
else:
    _USB_ERRORS, _USB_TIMEOUTS = (usb1.USBError,), (usb1.USBErrorTimeout,)

FOLDER = "/data/local/tmp/latency-lab"
"""On the phone: a place where the shell may write and run programs."""

DEFAULT_PORT = 5555
CONNECT_S = 5.0
"""How long a phone may take to answer while a connection is made."""
AUTHORISE_S = 10.0
"""How long somebody may take to accept the key on the phone's screen."""
COMMAND_S = 30.0
"""How long a small command may take."""
TRANSFER_S = 30.0
"""How long a file may make no progress on its way."""
IDLE_S = 2.0
"""A connection that was idle for longer is tried before it is used."""
WAIT_FOR_OTHERS_S = 900.0
"""How long to wait for another process that uses the phone."""
POLL_S = 0.02
MAX_OUTPUT = 64 << 20
RESERVE = 16 << 20
"""Bytes of storage that are left free on a phone."""
KEPT_OUTPUT = 1000
KEY = "adbkey"
KILL_TREE = (
    'tree() { set -- $1 $(grep -l "^PPid:[[:space:]]*$1\\$" /proc/[0-9]*/status 2>/dev/null | cut -d/ -f3); '
    "kill -9 $1 2>/dev/null; shift; for child; do tree $child; done; }"
)
"""For the phone's shell: ends a process and whatever it has started."""

_GONE = (
    OSError, struct.error, exceptions.AdbConnectionError, exceptions.AdbTimeoutError,
    exceptions.AdbCommandFailureException, exceptions.InvalidChecksumError, exceptions.InvalidCommandError,
    exceptions.InvalidResponseError, exceptions.InvalidTransportError, exceptions.TcpTimeoutException,
    exceptions.UsbDeviceNotFoundError, exceptions.UsbReadFailedError, exceptions.UsbWriteFailedError,
    *_USB_ERRORS,
    KeyError,  # adb-shell on an answer that the protocol of files does not have
)  # fmt: skip
_SILENT = (TimeoutError, exceptions.TcpTimeoutException, exceptions.AdbTimeoutError, *_USB_TIMEOUTS)


class TimedOut(Unreachable):
    """A command ran on the phone for longer than it may, and was killed: a tool that hangs, or else a phone whose
    system does."""


class NoSpace(Unreachable):
    """The phone's storage is full."""


@dataclass(frozen=True)
class Address:
    """Where a phone is: `HOST:PORT`, or `usb:SERIAL`, or `usb` where there is only one."""

    host: str | None = None
    port: int = DEFAULT_PORT
    serial: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        text = text.strip()
        if text == "usb" or text.startswith("usb:"):
            return cls(serial=text[4:] or None)
        host, colon, port = text.rpartition(":") if ":" in text else (text, "", "")
        try:
            number = int(port) if colon else DEFAULT_PORT
        except ValueError as error:
            raise InvalidInput(f"{text!r} is no phone", field="settings.devices", remedy=ADDRESSES) from error
        if not host or not 0 < number < 1 << 16:
            raise InvalidInput(f"{text!r} is no phone", field="settings.devices", remedy=ADDRESSES)
        return cls(host=host.strip("[]"), port=number)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.host is not None else f"usb:{self.serial or ''}".rstrip(":")


ADDRESSES = "HOST:PORT as in 192.168.0.7:5555, or usb:SERIAL"


@dataclass(frozen=True)
class Result:
    """What a command said, standard error included, and its exit code."""

    code: int
    output: str


def signer(folder: Path) -> PythonRSASigner:
    """The key of this computer, made on first use. Only its owner can read it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = folder / KEY
    with _locked(folder / "keys.lock", time.monotonic() + WAIT_FOR_OTHERS_S):
        if not key.exists():
            with tempfile.TemporaryDirectory(dir=folder) as name:  # of mode 0700: nobody sees the key on its way
                made = Path(name) / KEY
                keygen(str(made))
                made.chmod(0o600)
                made.with_suffix(".pub").replace(key.with_suffix(".pub"))
                made.replace(key)
        loose = key.stat().st_mode & 0o077
    if loose:
        raise InvalidInput(f"others may read {key}", field="settings.keys", remedy=f"chmod 600 {key}")
    return PythonRSASigner.FromRSAKeyPath(str(key))


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Holds a lock file. Raises Unreachable when another process does not let it go until the deadline."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Unreachable("another process uses the phone", remedy=f"it holds {path}") from error
            time.sleep(POLL_S)
        yield


class _Tcp(BaseTransport):
    """Bytes over TCP. Sends whole what it is given, and says at once when the other side has hung up."""

    def __init__(self, host: str, port: int) -> None:
        self.peer = (host, port)
        self.socket: socket.socket | None = None

    def connect(self, transport_timeout_s: float | None) -> None:
        self.socket = socket.create_connection(self.peer, timeout=transport_timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    @property
    def alive(self) -> bool:
        """False where the other side is known to have hung up."""
        if self.socket is None:
            return False
        self.socket.settimeout(0)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None) -> bytes:
        data = self._open(transport_timeout_s).recv(numbytes)
        if not data:
            raise ConnectionResetError("the phone hung up")
        return data

    def bulk_write(self, data: bytes, transport_timeout_s: float | None) -> int:
        self._open(transport_timeout_s).sendall(data)
        return len(data)

    def __del__(self) -> None:
        self.close()

    def _open(self, timeout_s: float | None) -> socket.socket:
        if self.socket is None:
            raise ConnectionResetError("not connected")
        self.socket.settimeout(timeout_s)
        return self.socket


class Phone:
    """A phone. Every method may be called in any thread and process; they wait for each other.

    They connect where need be, and raise Unreachable where the phone does not answer, has not authorised this
    computer, or is lost on the way; the next call tries again.
    """

    def __init__(self, address: Address, keys: Path, folder: str = FOLDER, authorise_s: float = AUTHORISE_S) -> None:
        self.address = address
        self.keys = keys
        self.folder = folder
        self.authorise_s = authorise_s
        self._device: AdbDevice | None = None
        self._transport: _Tcp | None = None
        self._used_at = 0.0
        self._proven = False
        """Whether the connection has carried a command since the phone was taken hold of."""
        self._last = "none"
        """What the latest command is called on the phone."""
        self._threads = threading.RLock()
        self._depth = 0
        self._kept: set[str] = set()
        """Files that this process has put there and may need again."""

    @contextmanager
    def hold(self, wait_s: float = WAIT_FOR_OTHERS_S) -> Iterator[None]:
        """Keeps the phone for this thread: nobody else's command runs in between."""
        with self._threads:
            if self._depth:
                yield
                return
            self.keys.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = re.sub(r"[^A-Za-z0-9.-]", "_", str(self.address))
            with _locked(self.keys / f"{name}.lock", time.monotonic() + wait_s):
                self._depth += 1
                try:
                    self._ensure()
                    yield
                finally:
                    self._depth -= 1
                    self._used_at = time.monotonic()
                    if self.address.host is None:
                        self._drop()  # an interface on USB has one user

    def run(self, command: str, timeout_s: float = COMMAND_S) -> Result:
        """Runs a command of the phone's shell. Raises TimedOut when it had to be killed."""
        with self.hold():
            return self._run(command, timeout_s)

    def check(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """The output of a command that must succeed; Unreachable where it does not."""
        result = self.run(command, timeout_s)
        if result.code != 0:
            said = result.output.strip()[-KEPT_OUTPUT:]
            raise Unreachable(f"{self.address}: {command!r} ended with exit code {result.code}: {said}")
        return result.output

    def put(self, source: bytes | Path, suffix: str = "", *, program: bool = False) -> str:
        """Brings a file to the phone, unless it is there, and returns its path: the SHA-256 of what is in it.

        Where storage is full, models that were not used for longest give way. Raises NoSpace where that is not enough.
        """
        if not re.fullmatch(r"(\.[a-z]+)?", suffix):
            raise ValueError(f"{suffix!r} is no suffix")
        size, digest = _measure(source)
        kind = "tools" if program else "models"
        path = f"{self.folder}/{kind}/{digest}{suffix}"
        with self.hold():
            self._kept.add(path)
            there = self._run(f"stat -c %s {path} && touch -c {path}", COMMAND_S)
            if there.code != 0 or there.output.strip() != str(size):
                self._push(source, size, digest, path)
            if program:
                self.check(f"chmod 755 {path}")
        return path

    def get(self, path: str) -> bytes:
        """A file of the phone's. Raises Unreachable where it cannot be had."""
        with self.hold():
            device = self._connected()
            into = io.BytesIO()
            try:
                device.pull(path, into, transport_timeout_s=TRANSFER_S, read_timeout_s=TRANSFER_S)
            except _GONE as error:
                self._drop()
                raise self._lost(f"{path} did not come", error) from error
            return into.getvalue()

    def free_bytes(self) -> int | None:
        """Free storage where files are put; None where the phone does not say."""
        result = self.run(f"df -k {shlex.quote(self.folder)}")
        cells = result.output.split("\n")[-2].split() if result.code == 0 and result.output.count("\n") > 1 else []
        percent = next((number for number, cell in enumerate(cells) if cell.endswith("%")), 0)
        return int(cells[percent - 1]) * 1024 if percent >= 1 and cells[percent - 1].isdigit() else None

    def close(self) -> None:
        with self._threads:
            self._drop()

    # ---------------------------------------------------------------------------------------------- connections

    def _connected(self) -> AdbDevice:
        if self._device is None:
            self._connect()
        assert self._device is not None
        return self._device

    def _ensure(self) -> None:
        """Makes a connection, or sees whether the one that was idle still stands."""
        self._proven = False
        if self._transport is not None and not self._transport.alive:
            self._drop()
        if self._device is not None and time.monotonic() - self._used_at > IDLE_S:
            try:
                self._device.shell("true", transport_timeout_s=CONNECT_S, read_timeout_s=CONNECT_S)
            except _GONE:
                self._drop()
        self._connected()

    def _connect(self) -> tuple[str, ...]:
        """Connects, and clears away what a lost connection left. Returns the names of commands that had begun."""
        key = signer(self.keys)
        prompted: list[object] = []
        try:
            if self.address.host is not None:
                self._transport = _Tcp(self.address.host, self.address.port)
                device = AdbDevice(self._transport, CONNECT_S)
            else:
                device = AdbDeviceUsb(self.address.serial, default_transport_timeout_s=CONNECT_S)
            device.connect(
                [key], transport_timeout_s=CONNECT_S, auth_timeout_s=self.authorise_s,
                read_timeout_s=max(CONNECT_S, self.authorise_s), auth_callback=prompted.append,
            )  # fmt: skip
        except (*_GONE, exceptions.DeviceAuthError) as error:
            self._drop()
            if prompted:
                raise Unreachable(
                    f"{self.address} has not authorised this computer",
                    remedy=f"accept the key on its screen, for good; the key is {self.keys / KEY}.pub",
                ) from error
            raise self._lost("no answer", error) from error
        self._device = device
        pids, parts = f"{self.folder}/run", f"{self.folder}/models/.*.part {self.folder}/tools/.*.part"
        cleared = self._run(
            f"mkdir -p {self.folder}/models {self.folder}/tools {pids}; rm -f {parts}; {KILL_TREE}; "
            f"for file in {pids}/*.pid; do [ -f $file ] || continue; read pid < $file; name=${{file##*/}}; "
            # A number may meanwhile be another process's: only a shell that names the file is ours.
            'if grep -q "$name" /proc/$pid/cmdline 2>/dev/null; then tree $pid; kill -9 -$pid 2>/dev/null; fi; '
            "rm -f $file; echo begun $name; done",
            COMMAND_S,
            guarded=False,
        )
        return tuple(re.findall(r"^begun (\w+)\.pid$", cleared.output, re.MULTILINE))

    def _drop(self) -> None:
        if self._device is not None:
            self._device.close()
        self._device = self._transport = None

    def _lost(self, what: str, error: BaseException) -> Unreachable:
        return Unreachable(f"{self.address}: {what} ({type(error).__name__}: {error})")

    # ------------------------------------------------------------------------------------------------- commands

    def _run(self, command: str, timeout_s: float, *, guarded: bool = True) -> Result:
        device = self._connected()
        word = secrets.token_hex(16)
        text = f"sh -c {shlex.quote(command)} </dev/null 2>&1; code=$?; "
        if guarded:
            # The file stays, empty, until the next command: it tells one that has come to its end from one that never
            # began.
            pid, last = (f"{self.folder}/run/{name}.pid" for name in (word, self._last))
            text = (
                f"[ -d {self.folder}/run ] || mkdir -p {self.folder}/run {self.folder}/models {self.folder}/tools; "
                f"rm -f {last}; echo $$ > {pid}; {text}{{ echo > {pid}; }} 2>/dev/null; "
            )
            self._last = word
        text += f"echo; echo {word}:$code"
        deadline = time.monotonic() + timeout_s
        said = bytearray()
        try:
            for chunk in device.streaming_shell(
                text, transport_timeout_s=timeout_s, read_timeout_s=timeout_s, decode=False
            ):
                said += chunk
                if time.monotonic() > deadline or len(said) > MAX_OUTPUT:
                    raise exceptions.AdbTimeoutError("it did not come to an end")
        except _GONE as error:
            self._drop()
            silent = isinstance(getattr(error, "usb_error", error), _SILENT)
            if not silent and not self._proven and guarded and word not in self._connect():
                return self._run(command, timeout_s)  # it was lost while it was idle: nothing has begun
            if not silent or not guarded:
                raise self._lost("the connection broke during a command", error) from error
            if word not in self._connect():  # raises Unreachable where the phone itself is silent
                raise self._lost("a command was lost", error) from error
            kept = said.decode(errors="replace").strip()[-KEPT_OUTPUT:]
            raise TimedOut(f"{self.address}: killed after {timeout_s:.0f} s: {command!r}; it said: {kept}") from error
        self._proven = True
        output = said.decode(errors="replace").replace("\r\n", "\n")
        found = re.search(rf"\n?{word}:(\d+)\s*\Z", output)
        if found is None:
            self._drop()
            raise Unreachable(f"{self.address}: the phone ended a command: {output.strip()[-KEPT_OUTPUT:]}")
        return Result(int(found[1]), output[: found.start()])

    # ---------------------------------------------------------------------------------------------------- files

    def _push(self, source: bytes | Path, size: int, digest: str, path: str) -> None:
        folder, _, name = path.rpartition("/")
        part = f"{folder}/.{name}.part"
        free = self.free_bytes()
        if free is not None and free < size + RESERVE and not self.make_room(size + RESERVE - free) and free < size:
            raise self._full(size, free)
        for last in (False, True):
            try:
                self._connected().push(
                    str(source) if isinstance(source, Path) else io.BytesIO(source), part,
                    transport_timeout_s=TRANSFER_S, read_timeout_s=TRANSFER_S,
                )  # fmt: skip
            except (*_GONE, exceptions.PushFailedError) as error:
                self._drop()
                self._connect()  # also removes the part; raises Unreachable where the phone is gone
                free = self.free_bytes()
                if "no space" not in str(error).lower() and (free is None or free >= size):
                    raise self._lost("a file did not get there", error) from error
                if last or not self.make_room(size + RESERVE):
                    raise self._full(size, free) from error
                continue
            arrived = self._run(f"stat -c %s {part} && sha256sum {part}", COMMAND_S + TRANSFER_S)
            if arrived.code == 0 and arrived.output.split()[:2] == [str(size), digest]:
                self.check(f"mv {part} {path}")
                return
            self._run(f"rm -f {part}", COMMAND_S)
            if last:
                raise Unreachable(
                    f"{self.address}: what arrived is not what was sent ({size} bytes, SHA-256 {digest}): "
                    f"{arrived.output.strip()[-KEPT_OUTPUT:]}"
                )

    def _full(self, size: int, free: int | None) -> NoSpace:
        left = "" if free is None else f", {free} are free"
        return NoSpace(
            f"{self.address}: no space for a file of {size} bytes{left}, and no old model to remove",
            remedy="free storage on the phone",
        )

    def make_room(self, wanted: int) -> bool:
        """Removes models until so many bytes are freed, least recently used first. Whether any was removed."""
        listed = self._run(f"ls -1tr {self.folder}/models", COMMAND_S)
        removed = 0
        for name in listed.output.split():
            path = f"{self.folder}/models/{name}"
            if path in self._kept or not re.fullmatch(r"[0-9a-f]{64}(\.[a-z]+)?", name):
                continue
            size = self._run(f"stat -c %s {path} && rm -f {path}", COMMAND_S).output.strip()
            removed += int(size) if size.isdigit() else 0
            if removed >= wanted:
                break
        return removed > 0


def _measure(source: bytes | Path) -> tuple[int, str]:
    """Size and SHA-256 of what is to be sent."""
    if isinstance(source, bytes):
        return len(source), hashlib.sha256(source).hexdigest()
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return os.fstat(file.fileno()).st_size, digest
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error}", field="file") from error


def split(text: str) -> Sequence[str]:
    """The phones of a list that commas separate. Raises InvalidInput where there is none, or one twice."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or len(set(found)) != len(found):
        raise InvalidInput(f"{text!r} names no phones, or one twice", field="settings.devices", remedy=ADDRESSES)
    for part in found:
        Address.parse(part)
    return found
