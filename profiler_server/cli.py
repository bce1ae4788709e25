"""The command `profiler-server`."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
import uvicorn
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from lut_db.errors import LatencyLabError
from lut_db.storage import Database
from profiler_server.app import create_app, prepare
from profiler_server.lab import Lab
from profiler_server.settings import Settings

GRACE_S = 10
"""How long requests may take to end once the server stops."""

BACKLOG = 2048
"""Connections that wait to be accepted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Server(uvicorn.Server):
    """Uvicorn that says where it listens, and wakes long polls when it stops."""

    def __init__(self, config: uvicorn.Config, lab: Lab, address: str):
        super().__init__(config)
        self._lab = lab
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"listening on {self._address}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lab.bell.close()
        await super().shutdown(sockets)


def make_server(settings: Settings, host: str = "127.0.0.1", port: int = 0) -> tuple[Server, socket.socket, str]:
    """A server, the socket that it is to serve (`server.run(sockets=[socket])`), and its address.

    Port 0 takes a free one. Raises StaleSchema before anything listens, and OSError where the port is taken.
    """
    application = create_app(settings)
    lab: Lab = application.state.lab
    prepare(lab)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # whoever connects from now on is served as soon as the start is over
    except OSError:
        listener.close()
        raise
    name = f"[{host}]" if family == socket.AF_INET6 else host
    address = f"http://{name}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        application, log_level="warning", timeout_graceful_shutdown=GRACE_S, lifespan="on", ws="none"
    )  # fmt: skip
    return Server(config, lab, address), listener, address


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    database: Annotated[str | None, typer.Option(help="sqlite:///FILE or postgresql://HOST/NAME.")] = None,
    upgrade: Annotated[bool | None, typer.Option(help="Make or upgrade the tables first.")] = None,
) -> None:
    """Serves latency tables: measures what is missing, once, whoever asks. PROFILER_… in the environment sets more."""
    given = {"database": database, "auto_upgrade": upgrade}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        server, listener, _ = make_server(settings, host, port)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"PROFILER_{'_'.join(map(str, first['loc'])).upper()}: {first['msg']}")
    except LatencyLabError as error:
        _fail(str(error))
    except SQLAlchemyError:
        _fail(f"{Database(settings.database)} cannot be reached: check that it runs and that the address is right")
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error.strerror} (choose another --port, or 0 for a free one)")
    # Uvicorn raises the signal that stopped it once more when everything is closed: that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


def _fail(message: str) -> NoReturn:
    print(f"profiler-server: {message}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
