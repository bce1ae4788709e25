"""What a client can ask a phone for over a stream: `shell:`, `exec:`, `sync:`, `reboot:` and a few that refuse."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from device_agents.simulated_phone import protocol
from device_agents.simulated_phone.phone import Phone
from device_agents.simulated_phone.sandbox import LEFT_ALONE_S, Sandbox

FEATURES = ("shell_v2", "stat_v2", "ls_v2", "fixed_push_mkdir")
"""What is advertised to clients, and nothing that is not served below."""

CHUNK_BYTES = 1 << 16
PATH_BYTES = 1024
SHELL_UID = 2000
FIRST_RAW_API_LEVEL = 24

WORDS = struct.Struct("<4sI")
STAT_V1 = struct.Struct("<4s3I")
STAT_V2 = struct.Struct("<4sIQQIIIIQqqq")
DENT_V1 = struct.Struct("<4s4I")
DENT_V2 = struct.Struct("<4sIQQIIIIQqqqI")


class Stream(Protocol):
    """One stream of a connection, as a service sees it."""

    async def read(self) -> bytes:
        """The next bytes from the client; none once it has closed."""

    async def write(self, data: bytes) -> None:
        """Sends bytes, however many. Raises ConnectionError once the client has closed or is gone."""

    async def gone(self) -> None:
        """Returns once the client has closed the stream or is gone."""

    def abort(self) -> None:
        """Drops the connection, as if the cable were pulled."""


Service = Callable[[Stream], Awaitable[None]]


def find(name: str, phone: Phone, sandbox: Sandbox) -> Service | None:
    """The service of this name, with its arguments; None where the phone has none."""
    kind, _, rest = name.partition(":")
    kind, *options = kind.split(",")
    if kind == "shell":
        return Shell(rest, options, phone, sandbox).serve
    if kind == "exec":
        return Shell(rest, ["raw"], phone, sandbox).serve
    if kind == "sync":
        return Sync(phone, sandbox).serve
    said = {
        "root": "adbd cannot run as root in production builds\n",
        "unroot": "adbd not running as root\n",
        "remount": "Not running as root. Try \"adb root\" first.\n",
        "disable-verity": "verity cannot be disabled/enabled - USER build\n",
    }  # fmt: skip
    if kind in said:
        return lambda stream: stream.write(said[kind].encode())
    if kind == "reboot":

        async def reboot(stream: Stream) -> None:
            phone.on_reboot()

        return reboot
    return None


# --- shell ---------------------------------------------------------------------------------------------------------


class Shell:
    """A command with its input and output. Options: `v2` (the shell protocol), `pty` or `raw`, `TERM=…`.

    When the client closes, a command gets SIGHUP if it runs in the shell protocol or on a terminal. Otherwise it runs
    on, as on a phone, without input or output.
    """

    def __init__(self, command: str, options: list[str], phone: Phone, sandbox: Sandbox) -> None:
        self.command = command
        self.v2 = "v2" in options
        # A shell without a command is meant for a person; before Android 7 every shell had a terminal.
        old = phone.identity.api_level < FIRST_RAW_API_LEVEL
        self.on_terminal = "pty" in options or ("raw" not in options and (old or not command))
        self.phone = phone
        self.sandbox = sandbox

    async def serve(self, stream: Stream) -> None:
        self.phone.history.append(f"shell {self.command}")
        if self.phone.take("hang", self.command):
            while await stream.read():
                continue  # whatever is typed, nothing comes
            return
        outer = inner = None
        if self.on_terminal:
            outer, inner = os.openpty()
        try:
            process = await self.sandbox.spawn(self.command, separate_errors=self.v2, terminal=inner)
        except OSError as error:
            await stream.write(self._packet(protocol.STDERR, f"/system/bin/sh: {error}\n".encode()))
            return
        finally:
            if inner is not None:
                os.close(inner)
        if outer is None:
            assert process.stdin is not None
            assert process.stdout is not None
            sources = {protocol.STDOUT: process.stdout}
            if process.stderr is not None:
                sources[protocol.STDERR] = process.stderr
            sink: asyncio.StreamWriter = process.stdin
        else:
            reader, sink = await _terminal(outer)
            sources = {protocol.STDOUT: reader}
        talk = asyncio.create_task(self._listen(stream, sink, outer))
        show = asyncio.create_task(self._show(stream, sources, process))
        gone = asyncio.create_task(stream.gone())
        try:
            await asyncio.wait({gone, show}, return_when=asyncio.FIRST_COMPLETED)
            if show.done():
                await show
        finally:
            if self.v2 or self.on_terminal:
                await self.sandbox.hang_up(process)
            elif gone.done():
                await asyncio.wait({talk}, timeout=LEFT_ALONE_S)  # what has come is still read by the command
            for task in (talk, show, gone):
                task.cancel()
            await asyncio.gather(talk, show, gone, return_exceptions=True)
            sink.close()
            self.sandbox.let_go(process)

    def _packet(self, kind: int, data: bytes) -> bytes:
        return protocol.shell_packet(kind, data) if self.v2 else data

    async def _show(
        self, stream: Stream, sources: dict[int, asyncio.StreamReader], process: asyncio.subprocess.Process
    ) -> None:
        sending = asyncio.Lock()

        async def forward(kind: int, source: asyncio.StreamReader) -> None:
            erase = self.sandbox.eraser()
            while True:
                data = await source.read(CHUNK_BYTES)
                shown = erase(data, not data)
                if shown:
                    async with sending:
                        await stream.write(self._packet(kind, shown))
                if not data:
                    return

        forwards = [asyncio.create_task(forward(kind, source)) for kind, source in sources.items()]
        try:
            await asyncio.gather(*forwards)
        finally:
            for task in forwards:
                task.cancel()
        code = await process.wait()
        if self.v2:
            await stream.write(protocol.shell_packet(protocol.EXIT, bytes([code if code >= 0 else 128 - code])))

    async def _listen(self, stream: Stream, sink: asyncio.StreamWriter, terminal: int | None) -> None:
        """Passes input on until the client closes the stream."""
        parser = protocol.ShellParser()
        while data := await stream.read():
            packets = parser.feed(data) if self.v2 else [(protocol.STDIN, data)]
            for kind, content in packets:
                if kind == protocol.STDIN:
                    with contextlib.suppress(ConnectionError):  # the command no longer reads
                        sink.write(content)
                        await sink.drain()
                elif kind == protocol.CLOSE_STDIN:
                    if terminal is None:
                        sink.close()
                elif kind == protocol.WINDOW_SIZE and terminal is not None:
                    size = content.rstrip(b"\0").decode(errors="replace").partition(",")[0]  # "24x80,0x0"
                    rows, _, columns = size.partition("x")
                    if rows.isdigit() and columns.isdigit():
                        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", int(rows), int(columns), 0, 0))


class _Terminal(asyncio.StreamReaderProtocol):
    """The outer end of a terminal. Reading fails once the inner end is closed: that is its end, and what was read
    before is still to be had, which an error would take away."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(None)


async def _terminal(outer: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: _Terminal(reader), os.fdopen(os.dup(outer), "rb", 0))
    transport, flow = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(outer, "wb", 0)
    )
    return reader, asyncio.StreamWriter(transport, flow, reader, loop)


# --- sync ----------------------------------------------------------------------------------------------------------


class _Closed(Exception):
    """The client has closed the stream, or sends what cannot be followed."""


class Sync:
    """File transfer: a stream of requests, each an id of four letters and a length."""

    def __init__(self, phone: Phone, sandbox: Sandbox) -> None:
        self.phone = phone
        self.sandbox = sandbox
        self.pending = bytearray()
        self.modified = 0
        self.complete = True

    async def serve(self, stream: Stream) -> None:
        self.stream = stream
        requests = {b"STAT": self._stat_v1, b"LST2": self._lstat_v2, b"STA2": self._stat_v2, b"LIST": self._list_v1,
                    b"LIS2": self._list_v2, b"SEND": self._send, b"RECV": self._receive}  # fmt: skip
        try:
            while True:
                name, length = WORDS.unpack(await self._take(WORDS.size))
                if name == b"QUIT":
                    return
                if name not in requests or length > PATH_BYTES:
                    await self._fail(f"unknown command {name!r} with a path of {length} bytes")
                    return
                await requests[name](os.fsdecode(await self._take(length)))
        except _Closed:
            return

    async def _take(self, size: int) -> bytes:
        while len(self.pending) < size:
            data = await self.stream.read()
            if not data:
                raise _Closed
            self.pending += data
        taken = bytes(self.pending[:size])
        del self.pending[:size]
        return taken

    async def _fail(self, message: str) -> None:
        data = message.encode()
        await self.stream.write(WORDS.pack(b"FAIL", len(data)) + data)

    # --- looking -----------------------------------------------------------------------------------------------

    async def _stat_v1(self, path: str) -> None:
        try:
            found = self.sandbox.resolve(path, follow=False).lstat()
        except OSError:
            await self.stream.write(STAT_V1.pack(b"STAT", 0, 0, 0))
            return
        await self.stream.write(STAT_V1.pack(b"STAT", found.st_mode, found.st_size & 0xFFFFFFFF, _seconds(found)))

    async def _lstat_v2(self, path: str) -> None:
        await self._answer_stat(b"LST2", path, follow=False)

    async def _stat_v2(self, path: str) -> None:
        await self._answer_stat(b"STA2", path, follow=True)

    async def _answer_stat(self, name: bytes, path: str, *, follow: bool) -> None:
        try:
            found = self.sandbox.resolve(path, follow=follow).lstat()
        except OSError as error:
            await self.stream.write(STAT_V2.pack(name, error.errno or 5, *[0] * 10))
            return
        await self.stream.write(STAT_V2.pack(name, 0, *_fields(found)))

    def _entries(self, path: str) -> list[tuple[bytes, os.stat_result]]:
        try:
            folder = self.sandbox.resolve(path)
            found = [(os.fsencode(name), (folder / name).lstat()) for name in sorted(os.listdir(folder))]
            return [(b".", folder.lstat()), (b"..", folder.parent.lstat()), *found]
        except OSError:
            return []  # adbd, too, lists nothing where there is no folder

    async def _list_v1(self, path: str) -> None:
        for name, found in self._entries(path):
            size = found.st_size & 0xFFFFFFFF
            await self.stream.write(DENT_V1.pack(b"DENT", found.st_mode, size, _seconds(found), len(name)) + name)
        await self.stream.write(DENT_V1.pack(b"DONE", 0, 0, 0, 0))

    async def _list_v2(self, path: str) -> None:
        for name, found in self._entries(path):
            await self.stream.write(DENT_V2.pack(b"DNT2", 0, *_fields(found), len(name)) + name)
        await self.stream.write(DENT_V2.pack(b"DONE", 0, *[0] * 11))

    # --- moving ------------------------------------------------------------------------------------------------

    async def _receive(self, path: str) -> None:
        self.phone.history.append(f"pull {path}")
        try:
            file = self.sandbox.resolve(path).open("rb")
        except OSError as error:
            await self._fail(f"open failed: {error.strerror}")
            return
        with file:
            while True:
                try:
                    data = file.read(CHUNK_BYTES)
                except OSError as error:
                    await self._fail(f"read failed: {error.strerror}")
                    return
                if not data:
                    break
                await self.stream.write(WORDS.pack(b"DATA", len(data)) + data)
        await self.stream.write(WORDS.pack(b"DONE", 0))

    async def _send(self, request: str) -> None:
        path, _, mode_text = request.rpartition(",")
        self.complete = False
        self.phone.history.append(f"push {path}")
        if not mode_text.isdigit():
            await self._discard()
            await self._fail(f"missing mode: {request}")
            return
        mode = int(mode_text)
        try:
            target = self.sandbox.resolve(path, follow=not stat.S_ISLNK(mode))
            self.sandbox.check_writable(target)
            if target.is_dir():
                raise IsADirectoryError(21, os.strerror(21), path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        except OSError as error:
            await self._discard()
            await self._fail(f"couldn't create file: {error.strerror}")
            return
        try:
            if stat.S_ISLNK(mode):
                content = b""
                while (chunk := await self._chunk()) is not None:
                    content += chunk
                target.symlink_to(os.fsdecode(content.rstrip(b"\0")))
            else:
                await self._write_file(target, path, mode)
        except ConnectionError:
            raise  # what has come so far stays on the phone
        except OSError as error:
            target.unlink(missing_ok=True)
            await self._discard()
            await self._fail(f"couldn't write: {error.strerror}")
            return
        await self.stream.write(WORDS.pack(b"OKAY", 0))

    async def _write_file(self, target: Path, path: str, mode: int) -> None:
        drop, full = self.phone.take("drop-push", path), self.phone.take("no-space", path)
        corrupt = self.phone.take("corrupt-push", path)
        room = self._room() if full is None else int(full.after)
        written = 0
        with target.open("wb") as file:
            # A user's permissions are everyone's, as on shared storage.
            user = mode & 0o700
            os.fchmod(file.fileno(), user | user >> 3 | user >> 6 if mode & 0o777 else 0o644)
            while (chunk := await self._chunk()) is not None:
                if drop is not None and written + len(chunk) > drop.after:
                    file.write(chunk[: int(drop.after) - written])
                    file.flush()
                    self.stream.abort()
                    raise ConnectionResetError(104, os.strerror(104))
                if written + len(chunk) > room:
                    raise OSError(28, os.strerror(28), path)
                file.write(chunk)
                written += len(chunk)
            if drop is not None:  # shorter than what was to be let through
                self.stream.abort()
                raise ConnectionResetError(104, os.strerror(104))
        if corrupt is not None and written:
            content = bytearray(target.read_bytes())
            content[len(content) // 2] ^= 0xFF
            target.write_bytes(content)
        os.utime(target, (self.modified, self.modified))

    def _room(self) -> int:
        """Bytes left on the phone."""
        used = 0
        for place in ("data", "storage"):
            for folder, _, names in os.walk(self.sandbox.root / place):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        used += os.lstat(os.path.join(folder, name)).st_size
        return self.phone.identity.storage_mib * (1 << 20) - used

    async def _chunk(self) -> bytes | None:
        """The next piece of a file, or None at its end, which carries the time of modification."""
        name, length = WORDS.unpack(await self._take(WORDS.size))
        if name == b"DONE":
            self.modified = length
            self.complete = True
            return None
        if name != b"DATA" or length > CHUNK_BYTES:
            await self._fail(f"invalid data message {name!r} of {length} bytes")
            raise _Closed
        return await self._take(length)

    async def _discard(self) -> None:
        """Reads what is left of a file whose end has not come yet, so that the next request is found behind it."""
        while not self.complete:
            await self._chunk()


def _seconds(found: os.stat_result) -> int:
    return max(0, int(found.st_mtime)) & 0xFFFFFFFF


def _fields(found: os.stat_result) -> tuple[int, ...]:
    return (
        found.st_dev, found.st_ino, found.st_mode, found.st_nlink, SHELL_UID, SHELL_UID, found.st_size,
        int(found.st_atime), int(found.st_mtime), int(found.st_ctime),
    )  # fmt: skip
