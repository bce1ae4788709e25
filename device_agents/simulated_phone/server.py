"""The device's side of ADB over TCP: connections, their proof of a key, and the streams on them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from device_agents.simulated_phone import protocol, services
from device_agents.simulated_phone.phone import Phone
from device_agents.simulated_phone.protocol import AUTH, CLSE, CNXN, OKAY, OPEN, WRTE, Packet, ProtocolError
from device_agents.simulated_phone.sandbox import Sandbox

KEYS = "data/misc/adb/adb_keys"
ANSWER = "authorize"
TICK_S = 0.25
REBOOT_AFTER_S = 0.1
LINE_BYTES = 1 << 20
MISHAPS = ("garbage", "crash-run", "fail-run", "hang-run")
"""Faults that a program itself brings about."""
OPEN_STREAMS_AT_MOST = 500

_log = logging.getLogger(__name__)


class Stream:
    """One stream: `services.Stream` over a connection's packets, with one message under way in each direction."""

    def __init__(self, connection: Connection, ours: int, theirs: int) -> None:
        self.connection = connection
        self.ours = ours
        self.theirs = theirs
        self.closed = False
        self.task: asyncio.Task[None] | None = None
        self._received: asyncio.Queue[bytes] = asyncio.Queue()
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._sending = asyncio.Lock()
        self._gone = asyncio.Event()

    def received(self, data: bytes) -> None:
        self._received.put_nowait(data)

    def acknowledged(self) -> None:
        self._may_send.set()

    def close(self) -> None:
        """The other side has closed, or is gone."""
        if not self.closed:
            self.closed = True
            self._received.put_nowait(b"")
            self._may_send.set()
            self._gone.set()

    async def read(self) -> bytes:
        while True:
            if self.closed and self._received.empty():
                return b""
            data = await self._received.get()
            if not data and self.closed:
                self._received.put_nowait(b"")  # for the next reader
                return b""
            if not self.closed:
                await self.connection.send(Packet(OKAY, self.ours, self.theirs))
            if data:
                return data

    async def write(self, data: bytes) -> None:
        async with self._sending:
            for begin in range(0, len(data), self.connection.max_payload):
                await self._may_send.wait()
                if self.closed:
                    raise ConnectionResetError("the client has closed the stream")
                self._may_send.clear()
                piece = data[begin : begin + self.connection.max_payload]
                await self.connection.send(Packet(WRTE, self.ours, self.theirs, piece))

    async def drain(self) -> None:
        """Returns once all that was sent is acknowledged, or nobody is left to do so."""
        async with self._sending:
            await self._may_send.wait()

    async def gone(self) -> None:
        await self._gone.wait()

    def abort(self) -> None:
        self.connection.abort(reset=True)


class Connection:
    """One client."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.version = server.version
        self.max_payload = protocol.MAX_PAYLOAD_BYTES
        self.online = False
        self.token = b""
        self.offered: bytes | None = None
        self.streams: dict[int, Stream] = {}
        self._numbers = 0
        self._sending = asyncio.Lock()

    async def serve(self) -> None:
        """Until the client or the phone ends the connection."""
        try:
            while True:
                packet = await self._receive()
                await self.server.thawed.wait()
                await self._handle(packet)
        except (asyncio.IncompleteReadError, OSError):
            _log.info("a client is gone")
        except ProtocolError as error:
            _log.warning("a connection is dropped: %s", error)
        finally:
            self.abort()
            for stream in list(self.streams.values()):
                stream.close()
            tasks = [stream.task for stream in self.streams.values() if stream.task is not None]
            if tasks:
                await asyncio.wait(tasks)

    def abort(self, reset: bool = False) -> None:
        """Ends the connection, unsent data included; the client sees its end, or with `reset` an error."""
        if reset and not self.writer.is_closing():
            end = self.writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def send(self, packet: Packet) -> None:
        await self.server.thawed.wait()
        async with self._sending:
            if self.writer.is_closing():
                raise ConnectionResetError("the connection is closed")
            # Until both have named their version, everything carries a checksum.
            version = self.version if self.online else protocol.WITH_CHECKSUM
            self.writer.write(protocol.pack(packet, version))
            await self.writer.drain()

    async def _receive(self) -> Packet:
        header = protocol.unpack_header(
            await self.reader.readexactly(protocol.HEADER.size), protocol.MAX_PAYLOAD_BYTES if self.online else 1 << 16
        )
        if hasattr(socket, "TCP_QUICKACK"):
            # Clients send in small pieces, and hold each back until the one before is acknowledged.
            self.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        payload = await self.reader.readexactly(header.length)
        return protocol.complete(header, payload, self.version if self.online else protocol.WITH_CHECKSUM)

    # --- becoming known ----------------------------------------------------------------------------------------

    async def _handle(self, packet: Packet) -> None:
        if packet.command == CNXN:
            self.version = min(self.server.version, packet.arg0)
            limit = protocol.MAX_PAYLOAD_OLD_BYTES if self.server.small_packets else protocol.MAX_PAYLOAD_BYTES
            self.max_payload = max(1, min(limit, packet.arg1))
            self.online = False
            if self.server.authorize is None:
                await self._welcome()
            else:
                await self._challenge()
        elif packet.command == AUTH:
            await self._authenticate(packet)
        elif not self.online:
            _log.warning("a client without authorization sends %s", packet)
        elif packet.command == OPEN:
            await self._open(packet)
        else:
            await self._pass_on(packet)

    async def _challenge(self) -> None:
        self.token = secrets.token_bytes(protocol.TOKEN_BYTES)
        await self.send(Packet(AUTH, protocol.AUTH_TOKEN, 0, self.token))

    async def _authenticate(self, packet: Packet) -> None:
        if self.online or not self.token:
            return
        if packet.arg0 == protocol.AUTH_SIGNATURE:
            token, self.token = self.token, b""  # good for one try
            if any(protocol.signed(key, token, packet.payload) for key in self.server.trusted()):
                await self._welcome()
            else:
                await self._challenge()
        elif packet.arg0 == protocol.AUTH_PUBLIC_KEY:
            protocol.public_key(packet.payload)
            self.offered = packet.payload.rstrip(b"\0\n")
            await self.server.prompt(self)
        else:
            raise ProtocolError(f"AUTH of kind {packet.arg0}")

    async def allow(self) -> None:
        """The prompt on the phone was answered with yes."""
        assert self.offered is not None
        self.server.remember(self.offered)
        self.offered = None
        await self._welcome()

    async def _welcome(self) -> None:
        props = self.server.phone.props
        banner = "device::" + "".join(
            f"{name}={props[name]};" for name in ("ro.product.name", "ro.product.model", "ro.product.device")
        )
        banner += f"features={','.join(services.FEATURES)}"
        limit = protocol.MAX_PAYLOAD_OLD_BYTES if self.server.small_packets else protocol.MAX_PAYLOAD_BYTES
        await self.send(Packet(CNXN, self.server.version, limit, banner.encode()))
        self.online = True

    # --- streams -----------------------------------------------------------------------------------------------

    async def _open(self, packet: Packet) -> None:
        name = packet.payload.rstrip(b"\0").decode(errors="surrogateescape")
        service = services.find(name, self.server.phone, self.server.sandbox)
        if service is None or not packet.arg0 or len(self.streams) >= OPEN_STREAMS_AT_MOST:
            await self.send(Packet(CLSE, 0, packet.arg0))
            return
        self._numbers += 1
        stream = Stream(self, self._numbers, packet.arg0)
        self.streams[stream.ours] = stream
        await self.send(Packet(OKAY, stream.ours, stream.theirs))
        stream.task = asyncio.create_task(self._run(stream, service))

    async def _run(self, stream: Stream, service: services.Service) -> None:
        try:
            await service(stream)
            if not stream.closed:
                await stream.drain()
        except ConnectionError:
            _log.info("a stream was closed by its client")
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("a service failed")
        finally:
            self.streams.pop(stream.ours, None)
            if not stream.closed:
                stream.closed = True
                with contextlib.suppress(ConnectionError):
                    await self.send(Packet(CLSE, stream.ours, stream.theirs))

    async def _pass_on(self, packet: Packet) -> None:
        stream = self.streams.get(packet.arg1)
        known = stream is not None and packet.arg0 in (0, stream.theirs) and not stream.closed
        if packet.command == CLSE:
            if stream is not None and known:
                stream.close()
                await self.send(Packet(CLSE, stream.ours, stream.theirs))
        elif stream is None or not known:
            if packet.command == WRTE:
                await self.send(Packet(CLSE, 0, packet.arg0))
        elif packet.command == OKAY:
            stream.acknowledged()
        elif packet.command == WRTE:
            if len(packet.payload) > self.max_payload:
                raise ProtocolError(f"WRTE of {len(packet.payload)} bytes, where {self.max_payload} were agreed")
            stream.received(packet.payload)


class Server:
    """A phone's ADB daemon, its clients, and the socket over which its programs ask the phone.

    `authorize` says how an unknown key is answered: `always`, `never`, `ask` (by `answer`, or by a file named
    `authorize` in the sandbox that says yes or no); None asks for no key at all.
    """

    def __init__(
        self, phone: Phone, sandbox: Sandbox, *, authorize: str | None = "always",
        version: int = protocol.WITHOUT_CHECKSUM, reboot_s: float = 1.0,
    ) -> None:  # fmt: skip
        self.phone = phone
        self.sandbox = sandbox
        self.authorize = authorize
        self.version = version
        self.small_packets = version < protocol.WITHOUT_CHECKSUM
        self.reboot_s = reboot_s
        self.port = 0
        self.alive = False
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.connections: set[Connection] = set()
        self._listener: asyncio.Server | None = None
        self._helper: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._changing = asyncio.Lock()
        phone.on_reboot = self._reboot

    def soon(self, work: Any) -> asyncio.Task[Any]:
        """Does something in the background, until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("in the background: %r", error)

    def _reboot(self) -> None:
        self.soon(self.die(REBOOT_AFTER_S, self.reboot_s))

    async def open(self, port: int) -> None:
        """Begins to serve; `port` 0 takes a free one."""
        self.port = port
        await self._boot()
        self.soon(self._tick())
        for fault in [fault for fault in self.phone.faults if fault.name in ("die", "freeze")]:
            self.phone.faults.remove(fault)
            self.soon(self.die(fault.after, fault.seconds) if fault.name == "die" else self.freeze(fault.seconds))

    async def _boot(self) -> None:
        await self.sandbox.start()
        self.sandbox.refresh()
        await self._listen_to_programs()
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]
        self.alive = True

    async def close(self) -> None:
        """Ends all connections and all that runs on the phone."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with self._changing:
            await self._shut_down()

    async def _shut_down(self) -> None:
        self.alive = False
        for listener in (self._listener, self._helper):
            if listener is not None:
                listener.close()
        self._listener = self._helper = None
        self.thawed.set()
        self.drop_all(reset=False)
        await self.sandbox.stop()
        if self._serving:
            await asyncio.wait(self._serving)
        self.phone.loads.clear()

    async def die(self, after: float = 0.0, seconds: float = 0.0) -> None:
        """Is gone after a while, and back after another (0: only when woken)."""
        await asyncio.sleep(after)
        async with self._changing:
            if self.alive:
                await self._shut_down()
        if seconds:
            await asyncio.sleep(seconds)
            await self.wake()

    async def wake(self) -> None:
        """Comes back, on the same port, with all files."""
        async with self._changing:
            if not self.alive:
                await self._boot()

    async def freeze(self, seconds: float) -> None:
        """Keeps connections open and answers nothing for a while."""
        self.thawed.clear()
        await asyncio.sleep(seconds)
        self.thawed.set()

    def drop_all(self, reset: bool = True) -> None:
        for connection in list(self.connections):
            connection.abort(reset)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(self, reader, writer)
        self.connections.add(connection)
        self._serving.add(task)
        try:
            await connection.serve()
        finally:
            self.connections.discard(connection)
            self._serving.discard(task)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.alive:
                self.sandbox.refresh()
            answer = self.sandbox.root / ANSWER
            if self.authorize == "ask" and self._shown() and answer.exists():
                text = answer.read_text().strip().lower()
                answer.unlink()
                await self.answer(text in ("yes", "always"))

    # --- keys --------------------------------------------------------------------------------------------------

    @property
    def _key_file(self) -> Path:
        return self.sandbox.root / KEYS

    def trusted(self) -> list[rsa.RSAPublicKey]:
        """The keys that this phone trusts."""
        if not self._key_file.exists():
            return []
        return [protocol.public_key(line) for line in self._key_file.read_bytes().splitlines() if line.strip()]

    def remember(self, line: bytes) -> None:
        with self._key_file.open("ab") as file:
            file.write(line + b"\n")

    def forget_keys(self) -> None:
        self._key_file.unlink(missing_ok=True)

    async def prompt(self, connection: Connection) -> None:
        if self.authorize == "always":
            await connection.allow()

    def _shown(self) -> list[Connection]:
        """Connections whose unknown key is being asked about."""
        return [connection for connection in self.connections if connection.offered is not None]

    async def answer(self, yes: bool) -> int:
        """Answers the prompts that are shown. Returns how many there were."""
        shown = self._shown()
        for connection in shown:
            if yes:
                with contextlib.suppress(ConnectionError):  # it may be gone by now
                    await connection.allow()
            else:
                connection.offered = None
        return len(shown)

    # --- programs on the phone ---------------------------------------------------------------------------------

    async def _listen_to_programs(self) -> None:
        # Through the folder's descriptor: a socket's address is short, a sandbox's path may be long.
        folder = os.open(self.sandbox.root / "dev/socket", os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX)
        try:
            path = f"/proc/self/fd/{folder}/phone"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
        finally:
            os.close(folder)
        listener.listen(128)
        listener.setblocking(False)
        self._helper = await asyncio.start_unix_server(self._help, sock=listener, limit=LINE_BYTES)

    async def _help(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers a program. One that runs a model keeps its connection open for as long as it does: a load."""
        key = object()
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while line := await reader.readline():
                request = json.loads(line)
                if "tool" in request:
                    found = self.phone.tool(request["tool"])
                    answer: dict[str, Any] = {"out": found.out, "err": found.err, "code": found.code}
                else:
                    answer = self._begin_run(key, request["run"])
                self.sandbox.refresh()
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError) as error:
            _log.info("a program on the phone is gone: %r", error)
        finally:
            self.phone.end_load(key)
            self._serving.discard(task)
            writer.close()

    def _begin_run(self, key: object, run: dict[str, Any]) -> dict[str, Any]:
        subject = " ".join(run["argv"])
        self.phone.history.append(f"run {subject}")
        self.phone.begin_load(key, int(run["threads"]))
        if (drop := self.phone.take("drop-run", subject)) is not None:
            self.soon(self._drop_later(drop.after))
        mishap = next((name for name in MISHAPS if self.phone.take(name, subject)), None)
        return {
            "mishap": mishap, "noise": self.phone.climate.noise, "gpu": self.phone.gpu, "nnapi": self.phone.nnapi,
            "format": self.phone.benchmark_format,
        }  # fmt: skip

    async def _drop_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.drop_all()
