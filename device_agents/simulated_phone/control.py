"""Changes a simulated phone while it runs: lines of JSON over a loopback port."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import asdict, fields
from types import TracebackType
from typing import Any, Self

from device_agents.simulated_phone.phone import Climate, Fault
from device_agents.simulated_phone.server import LINE_BYTES, Server
from lut_db.errors import InvalidInput, LatencyLabError

PATIENCE_S = 30.0


class Refused(LatencyLabError):
    """The phone does not do what it was told; the message says why."""


class Control:
    """A client of a phone's control port. Raises Refused where the phone does, and OSError where it is gone."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _do(self, do: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the phone has closed its control port")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["done"]

    def fault(self, name: str, *, times: int = 1, after: float = 0.0, seconds: float = 0.0, match: str = "") -> None:
        """Arms a fault (`phone.FAULTS`): for the next `times` commands or paths that contain `match`."""
        self._do("fault", **asdict(Fault(name, times, after, seconds, match)))

    def clear(self) -> None:
        """Disarms every fault."""
        self._do("clear")

    def state(self) -> dict[str, Any]:
        """Temperature, pace, load, battery, faults still armed, and `history`: what clients and programs did."""
        found: dict[str, Any] = self._do("state")
        return found

    def set(self, **values: Any) -> None:
        """Sets `temperature_c`, `battery_level`, `usb_powered`, `gpu`, `nnapi`, `benchmark_format`, `authorize`, or a
        field of `phone.Climate`: `speed`, `noise`, `ambient_c`, `rise_c`, `seconds`, `throttle_c`, `watts`."""
        self._do("set", values=values)

    def heat(self, celsius: float) -> None:
        """Makes it that hot at once; it cools at its own pace."""
        self.set(temperature_c=celsius)

    def forget_keys(self) -> None:
        """Trusts no key any longer and drops the connections: with `set(authorize="never")` it is unauthorised."""
        self._do("forget_keys")

    def answer(self, yes: bool = True) -> int:
        """Answers the prompts for unknown keys that are shown. Returns how many there were."""
        return int(self._do("answer", yes=yes))

    def drop(self) -> None:
        """Drops all connections at once."""
        self._do("drop")

    def die(self, seconds: float = 0.0) -> None:
        """Is gone at once, and back after that time; 0: until `wake`. Returns when it is gone."""
        self._do("die", seconds=seconds)

    def wake(self) -> None:
        """Returns when it is back."""
        self._do("wake")


class ControlServer:
    """The phone's end of `Control`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = 0

    async def open(self, port: int) -> None:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=LINE_BYTES)
        self.port = listener.sockets[0].getsockname()[1]
        self._listener = listener

    async def close(self) -> None:
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    answer = {"done": await self._obey(json.loads(line))}
                except (LatencyLabError, ValueError, TypeError, KeyError, OSError) as error:
                    answer = {"error": f"{error}" if isinstance(error, LatencyLabError) else repr(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except ConnectionError:
            return  # whoever was in control has left
        finally:
            writer.close()

    async def _obey(self, request: dict[str, Any]) -> Any:
        server, phone = self.server, self.server.phone
        do = request.pop("do")
        match do:
            case "fault":
                fault = Fault(**request)
                if fault.name == "freeze":
                    server.soon(server.freeze(fault.seconds))
                elif fault.name == "die":
                    server.soon(server.die(fault.after, fault.seconds))
                else:
                    phone.faults.append(fault)
            case "clear":
                phone.faults.clear()
                server.thawed.set()
            case "state":
                return phone.state() | {"alive": server.alive, "connections": len(server.connections)}
            case "set":
                self._set(request["values"])
            case "forget_keys":
                server.forget_keys()
                server.drop_all()
            case "answer":
                return await server.answer(bool(request["yes"]))
            case "drop":
                server.drop_all()
            case "die":
                await server.die()
                if request["seconds"]:
                    server.soon(self._wake_later(request["seconds"]))
            case "wake":
                await server.wake()
            case _:
                raise InvalidInput(f"{do!r} is nothing a phone can do", field="do")
        return None

    async def _wake_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.server.wake()

    def _set(self, values: dict[str, Any]) -> None:
        phone = self.server.phone
        choices = {
            "gpu": DELEGATIONS, "nnapi": DELEGATIONS, "benchmark_format": FORMATS, "authorize": AUTHORIZATIONS,
        }  # fmt: skip
        climate = {field.name for field in fields(Climate)}
        plain = {"battery_level", "usb_powered", "temperature_c", *choices}
        for name, value in values.items():
            if name not in climate | plain:
                raise InvalidInput(
                    f"there is no {name!r} to set", field=name, remedy=", ".join(sorted(climate | plain))
                )
            if name in choices and value not in choices[name]:
                raise InvalidInput(f"{value!r}", field=name, remedy=f"one of {', '.join(choices[name])}")
        phone.warm()
        changed = {name: value for name, value in values.items() if name in climate}
        phone.climate = Climate(**{**asdict(phone.climate), **changed})
        for name, value in values.items():
            if name == "temperature_c":
                phone.set_temperature(float(value))
            elif name == "authorize":
                self.server.authorize = value
            elif name in plain:
                setattr(phone, name, value)
        if self.server.alive:
            self.server.sandbox.refresh()


DELEGATIONS = ("full", "partial", "none")
FORMATS = ("old", "new")
AUTHORIZATIONS = ("always", "never", "ask")
