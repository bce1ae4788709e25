"""The command `device-agent simulated-phone`."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from device_agents.simulated_phone import protocol
from device_agents.simulated_phone.control import ControlServer
from device_agents.simulated_phone.phone import FAULTS, Climate, Fault, Identity, Phone
from device_agents.simulated_phone.sandbox import TMP, Sandbox
from device_agents.simulated_phone.server import Server
from lut_db.errors import LatencyLabError


class Authorize(StrEnum):
    always = "always"
    never = "never"
    ask = "ask-file"
    off = "off"


class Delegation(StrEnum):
    full = "full"
    partial = "partial"
    none = "none"


class Format(StrEnum):
    old = "old"
    new = "new"


class Protocol(StrEnum):
    old = "old"
    new = "new"


def command(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, which is printed")] = 5555,
    model: Annotated[str, typer.Option(help="ro.product.model")] = "Pixel 8",
    api_level: Annotated[int, typer.Option(help="ro.build.version.sdk")] = 35,
    android: Annotated[str, typer.Option(help="ro.build.version.release")] = "15",
    build: Annotated[str, typer.Option(help="build id, part of the fingerprint")] = "AP4A.250105.002",
    serial: Annotated[str, typer.Option(help="ro.serialno")] = "SIM00000001",
    little_cores: Annotated[int, typer.Option(help="slow cores; they come first")] = 4,
    big_cores: Annotated[int, typer.Option(help="fast cores")] = 4,
    storage_mib: Annotated[int, typer.Option(help="room on the phone")] = 512,
    rooted: Annotated[bool, typer.Option("--rooted", help="its shell may write below /sys, as to governors")] = False,
    root: Annotated[Path | None, typer.Option(help="folder of the phone's files; a temporary one if not given")] = None,
    isolate: Annotated[
        bool | None, typer.Option("--isolate/--plain", help="demand isolated commands or do without; else what works")
    ] = None,
    benchmark_model: Annotated[str, typer.Option(help="path of LiteRT's tool on the phone")] = f"{TMP}/benchmark_model",
    perf_test: Annotated[str, typer.Option(help="path of ONNX Runtime's")] = f"{TMP}/onnxruntime_perf_test",
    benchmark_format: Annotated[Format, typer.Option(help="generation of benchmark_model's output")] = Format.new,
    gpu: Annotated[Delegation, typer.Option(help="how much of a graph its GPU takes")] = Delegation.full,
    nnapi: Annotated[Delegation, typer.Option(help="how much of a graph NNAPI takes")] = Delegation.full,
    speed: Annotated[float, typer.Option(help="2 makes every run take twice as long")] = 1.0,
    noise: Annotated[float, typer.Option(help="standard deviation of the logarithm of a run's time")] = 0.0,
    ambient: Annotated[float, typer.Option(help="temperature at rest, in degrees Celsius")] = 27.0,
    heat: Annotated[float, typer.Option(help="degrees that it warms under full load")] = 8.0,
    heat_seconds: Annotated[float, typer.Option(help="time constant of warming and cooling")] = 60.0,
    throttle_at: Annotated[float, typer.Option(help="degrees above which its clocks fall")] = 42.0,
    watts: Annotated[float, typer.Option(help="what its power rails count under full load; 0: they do not")] = 0.0,
    battery: Annotated[int, typer.Option(min=0, max=100, help="level in percent")] = 85,
    authorize: Annotated[
        Authorize, typer.Option(help="unknown keys: always, never, as its file `authorize` says; off: no key is asked")
    ] = Authorize.always,
    protocol_version: Annotated[
        Protocol, typer.Option("--protocol", help="old: with checksums, 4 KiB a packet")
    ] = Protocol.new,
    reboot_seconds: Annotated[float, typer.Option(help="how long a reboot takes")] = 1.0,
    control_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="port for `control.Control`; 0 takes a free one")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:times=N,after=X,seconds=S,match=TEXT]; " + "; ".join(map(": ".join, FAULTS.items()))),
    ] = None,
) -> None:  # fmt: skip
    """A phone as far as ADB can see, on a loopback port.

    Connect with `adb connect 127.0.0.1:PORT` or adb-shell. Its programs `benchmark_model` and `onnxruntime_perf_test`
    really run the models that are pushed, with LiteRT and ONNX Runtime.

    Where Linux has user namespaces (or for root) commands run isolated, with the phone's files as their root. Elsewhere
    absolute Android paths in commands and output are rewritten, and a script on the phone that names such paths fails.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        identity = Identity(
            model=model, api_level=api_level, android=android, build=build, serial=serial, little_cores=little_cores,
            big_cores=big_cores, storage_mib=storage_mib, rooted=rooted,
        )  # fmt: skip
        phone = Phone(
            identity=identity,
            climate=Climate(speed, noise, ambient, heat, heat_seconds, throttle_at, watts),
            battery_level=battery, gpu=gpu.value, nnapi=nnapi.value, benchmark_format=benchmark_format.value,
            faults=[Fault.parse(text) for text in fault or []],
        )  # fmt: skip
        with ExitStack() as stack:
            if root is None:
                root = Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="phone-", ignore_cleanup_errors=True))
                )
            programs = {"benchmark_model": benchmark_model, "onnxruntime_perf_test": perf_test}
            sandbox = Sandbox(root, phone, programs, isolate)
            allowed = {Authorize.off: None, Authorize.ask: "ask"}.get(authorize, authorize.value)
            version = protocol.WITH_CHECKSUM if protocol_version is Protocol.old else protocol.WITHOUT_CHECKSUM
            asyncio.run(_run(phone, sandbox, port, control_port, allowed, version, reboot_seconds))
    except (LatencyLabError, OSError) as error:
        typer.echo(f"simulated-phone: {error}", err=True)
        raise typer.Exit(2) from error


async def _run(
    phone: Phone,
    sandbox: Sandbox,
    port: int,
    control_port: int | None,
    authorize: str | None,
    version: int,
    reboot_s: float,
) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        # What is ignored here, as under nohup, commands would ignore too; what is handled they do not inherit.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    server = Server(phone, sandbox, authorize=authorize, version=version, reboot_s=reboot_s)
    control = ControlServer(server) if control_port is not None else None
    try:
        await server.open(port)
        if control is not None and control_port is not None:
            await control.open(control_port)
            print(f"control on 127.0.0.1:{control.port}", flush=True)
        print(f"files in {sandbox.root}, commands {'isolated' if sandbox.isolated else 'in plain sight'}", flush=True)
        print(f"listening on 127.0.0.1:{server.port}", flush=True)
        await ended.wait()
    finally:
        if control is not None:
            await control.close()
        await server.close()


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
