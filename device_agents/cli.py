"""The command `device-agent`: one sub-command for each backend, `doctor` and `bench`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from device_agents import backends, evidence
from device_agents.agent import Agent, serve_all
from device_agents.backends import Options
from device_agents.bench import bench_file
from device_agents.settings import core_list
from device_agents.simulated_phone.cli import command as simulated_phone
from lut_db.errors import InvalidInput, LatencyLabError
from lut_db.plans import WHOLE

app = typer.Typer(
    help="Measures operators and networks on a device, for a profiling service.", no_args_is_help=True,
    pretty_exceptions_enable=False,
)  # fmt: skip


RESTARTED = "LATENCY_LAB_RESTARTED"


@app.callback()
def main() -> None:
    """Measures operators and networks on a device, for a profiling service."""


def _cores(text: str | None, threads: int) -> tuple[int, ...]:
    if text is None:
        return evidence.default_cores(threads)
    found = core_list(text, "cores")
    if found:
        evidence.check_cores(found, threads)
    return found


def _settings(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(f"{pair!r} is no setting", field="setting", remedy="write NAME=VALUE")
        settings[name] = value
    return settings


WHICH = ("devices", "gpu")
"""Settings that say which of a host's devices it is."""


def _device_name(backend: str, options: Options, given: str | None = None, *, several: bool = False) -> str:
    """What a device is called: as is given or after its host, and by what tells it from the others of this host. What
    a service knows of a device, that it may join a pool or must not, it knows by this name."""
    which = "-".join(filter(None, (_plain(options.settings.get(name, "").removeprefix("usb:")) for name in WHICH)))
    if given is not None:
        return f"{given}-{which}" if several else given
    parts = [(_plain(platform.node()) or "device")[:16], backend, which[-22:]]
    others = {name: value for name, value in options.settings.items() if name not in WHICH}
    cores = () if options.cores == evidence.default_cores(options.threads) else options.cores
    if others or cores or options.threads > 1:
        how = json.dumps([options.threads, cores, others], sort_keys=True)
        parts.append(hashlib.sha256(how.encode()).hexdigest()[:6])
    return "-".join(filter(None, parts))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")


def _options(threads: int, cores: str | None, setting: list[str], energy: bool = True) -> Options:
    return Options(threads=threads, cores=_cores(cores, threads), energy=energy, settings=_settings(setting))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (LatencyLabError, backends.Unsupported) as error:
        typer.echo(f"device-agent: {error}", err=True)
        raise typer.Exit(2) from error


def _serve(backend: str, server: str, name: str | None, options: Options, max_operators: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _explained():
        each = backends.devices(backend, options)
        agents = [
            Agent(
                server=server, backend_name=backend, backend=backends.create(backend, of_device), options=of_device,
                name=_device_name(backend, of_device, name, several=len(each) > 1), max_operators=max_operators,
            )
            for of_device in each
        ]  # fmt: skip

        told = False

        def stop(*_: object) -> None:
            nonlocal told
            if told:  # a signal that comes while one is answered would wait for the lock of an event for ever
                return
            told = True
            for agent in agents:
                agent.stop()

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, stop)
        serve_all(agents)


Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime")]
Cores = Annotated[
    str | None,
    typer.Option(help="cores to pin them to, like 2,3 or 4-7, as taskset takes them, or any; the last ones by default"),
]
Setting = Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a setting of the backend")]


@app.command()
def doctor(backend: str, threads: Threads = 1, cores: Cores = None, setting: Setting = None) -> None:
    """Checks everything that a backend needs and says what to do about each lack."""
    with _explained():
        lacking = False
        options = _options(threads, cores, setting or [])
        settings = list(backends.check_settings(backend, options))
        # With other settings than it can have nothing else can be looked at.
        others = backends.module(backend).doctor(options) if all(check.ok for check in settings) else ()
        for check in chain(settings, others):
            typer.echo(f"{'ok  ' if check.ok else 'LACK'}  {check.name}: {check.found}")
            if not check.ok:
                lacking = True
                typer.echo(f"      -> {check.remedy}")
    if lacking:
        raise typer.Exit(1)


@app.command()
def bench(
    backend: str,
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a .onnx or .tflite file")],
    threads: Threads = 1,
    cores: Cores = None,
    setting: Setting = None,
    runs: Annotated[int, typer.Option(min=1, help="timed runs at most in each session")] = 100,
    sessions: Annotated[int, typer.Option(min=1, help="fresh sessions")] = 3,
    load_tolerance: Annotated[
        float, typer.Option(min=0.001, help="cores that other processes may use meanwhile")
    ] = WHOLE.load_tolerance,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Measures a model file on a device, without any service."""
    with _explained():
        options = _options(threads, cores, setting or [])
        if "fine_clock" in backends.module(backend).SETTINGS:  # nothing is profiled
            options = replace(options, settings={"fine_clock": "off", **options.settings})
        measuring = backends.create(backend, options)
        environment = measuring.environment()
        if any(os.environ.get(name) != value for name, value in environment.items()):
            if RESTARTED in os.environ:
                names = ", ".join(environment)
                raise InvalidInput(
                    f"this system does not let a command keep {names}", field="settings",
                    remedy="huge_pages=off and fine_clock=off",
                )  # fmt: skip
            # Some are read only at the start.
            os.execve(sys.executable, sys.orig_argv, os.environ | environment | {RESTARTED: "1"})
        if options.cores:
            os.sched_setaffinity(0, options.cores)
        result = bench_file(measuring, model, runs, sessions, load_tolerance)
    typer.echo(result.model_dump_json(indent=2) if json_output else str(result))


def _add(backend: str) -> None:
    @app.command(backend, help=f"Serves this machine's devices with the backend {backend}, until told to stop.")
    def serve(
        server: Annotated[str, typer.Option(help="URL of the profiling service")] = "http://127.0.0.1:8000",
        name: Annotated[
            str | None, typer.Option(help="name of this device; made from the host's, and from how it is measured")
        ] = None,
        threads: Threads = 1,
        cores: Cores = None,
        setting: Setting = None,
        max_operators: Annotated[int, typer.Option(min=1, max=1024, help="operators measured at a time")] = 128,
        energy: Annotated[
            bool, typer.Option(help="count joules where the device does: a second or two for each graph")
        ] = True,
    ) -> None:
        with _explained():
            options = _options(threads, cores, setting or [], energy)
        _serve(backend, server, name, options, max_operators)


for _name in backends.names():
    _add(_name)
app.command("simulated-phone")(simulated_phone)


if __name__ == "__main__":
    app()
