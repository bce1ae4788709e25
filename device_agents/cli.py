"""The command `device-agent NAME`: one sub-command for each backend."""

from __future__ import annotations

import logging
import platform
import re
import signal
from typing import Annotated

import typer

from device_agents import backends, evidence
from device_agents.agent import Agent, Refused
from device_agents.backends import Options
from lut_db.errors import InvalidInput

app = typer.Typer(
    help="Measures operators and networks on a device, for a profiling service.", no_args_is_help=True,
    pretty_exceptions_enable=False,
)  # fmt: skip


@app.callback()
def main() -> None:
    """Measures operators and networks on a device, for a profiling service."""


def _cores(text: str | None, threads: int) -> tuple[int, ...]:
    if text is None:
        return evidence.default_cores(threads)
    if text == "any":
        return ()
    try:
        return tuple(sorted({int(core) for core in text.split(",")}))
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no list of cores", field="cores", remedy="like 2,3, or any") from error


def _settings(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(f"{pair!r} is no setting", field="setting", remedy="write NAME=VALUE")
        settings[name] = value
    return settings


def _default_name(backend: str) -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).strip("-._") or "device"
    return f"{host[:40]}-{backend}"[:64]


def _serve(
    backend: str, server: str, name: str | None, threads: int, cores: str | None, setting: list[str], max_operators: int
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        options = Options(threads=threads, cores=_cores(cores, threads), settings=_settings(setting))
        agent = Agent(
            server=server, name=name or _default_name(backend), backend_name=backend,
            backend=backends.create(backend, options), options=options, max_operators=max_operators,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        agent.run()
    except (InvalidInput, Refused) as error:
        typer.echo(f"device-agent: {error}", err=True)
        raise typer.Exit(2) from error


def _add(backend: str) -> None:
    @app.command(backend, help=f"Serves this machine with the backend {backend}, until it is told to stop.")
    def serve(
        server: Annotated[str, typer.Option(help="URL of the profiling service")] = "http://127.0.0.1:8000",
        name: Annotated[str | None, typer.Option(help="name of this device; made from the host's")] = None,
        threads: Annotated[int, typer.Option(min=1, help="threads of the runtime")] = 1,
        cores: Annotated[str | None, typer.Option(help="cores to pin them to, like 2,3, or any; the last ones")] = None,
        setting: Annotated[list[str], typer.Option(help="NAME=VALUE, a setting of the backend")] = [],  # noqa: B006
        max_operators: Annotated[int, typer.Option(min=1, max=1024, help="operators measured at a time")] = 128,
    ) -> None:
        _serve(backend, server, name, threads, cores, setting, max_operators)


for _name in backends.names():
    _add(_name)


if __name__ == "__main__":
    app()
