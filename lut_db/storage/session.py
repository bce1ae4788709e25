"""The database: SQLite or PostgreSQL behind one address, its transactions and its schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from lut_db.errors import InvalidInput, StaleSchema

BUSY_TIMEOUT_MS = 15_000
"""How long a SQLite writer waits for another."""

POOL_SIZE = 8
MAX_OVERFLOW = 40
"""Connections beyond the pool: as many as a server's thread pool can use at once."""

SCHEMA_LOCK = 0x6C61_7465
"""PostgreSQL advisory lock under which the schema is upgraded."""

MIGRATIONS = Path(__file__).parent / "migrations"


def parse_url(address: str) -> URL:
    """The URL of a database, with the driver that this program uses. Raises InvalidInput for any other database."""
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise InvalidInput(
            "this is no database URL", field="database", remedy="use sqlite:///FILE or postgresql://HOST/NAME"
        ) from error
    backend = url.drivername.partition("+")[0]
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise InvalidInput("SQLite needs a file", field="database", remedy="use sqlite:///FILE")
        return url.set(drivername="sqlite+pysqlite")
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise InvalidInput(
        f"{backend} is not supported", field="database", remedy="use sqlite:///FILE or postgresql://HOST/NAME"
    )


def _prepare_sqlite(engine: Engine) -> None:
    """Foreign keys, write-ahead log, and transactions that begin when we say so, as we say so."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction behind our back
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        # A writer takes the lock at once: a reader that turns writer half-way would be refused as stale.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Database:
    """One database, its pool of connections, and the two kinds of transactions.

    >>> database = Database("sqlite:///tables.sqlite")
    >>> database.upgrade()
    >>> with database.write() as session: ...   # commits at the end, rolls back on an exception
    """

    def __init__(self, address: str):
        self.url = parse_url(address)
        self.dialect = self.url.get_backend_name()
        arguments: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": MAX_OVERFLOW, "future": True}
        if self.dialect == "postgresql":
            arguments["pool_pre_ping"] = True  # the database may have been restarted since the last transaction
        self.engine = create_engine(self.url, **arguments)
        if self.dialect == "sqlite":
            _prepare_sqlite(self.engine)
        self._writer = self.engine.execution_options(writes=True)

    def __str__(self) -> str:
        return self.url.set(drivername=self.dialect).render_as_string(hide_password=True)

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(self.url.database) if self.dialect == "sqlite" and self.url.database else None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads. On SQLite it takes no lock that a writer would wait for."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that writes: committed when the block ends, rolled back when it raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def revision(self) -> str | None:
        """The revision of the schema that is there, None where there is none."""
        with self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def check(self) -> None:
        """Raises StaleSchema, with the command that helps, unless the schema is the one of this program."""
        found, wanted = self.revision(), head()
        if found == wanted:
            return
        remedy = f"run: lut-db upgrade --database {self}"
        if found is None:
            raise StaleSchema(f"{self} has no tables yet", remedy=remedy)
        if found not in known_revisions():
            raise StaleSchema(
                f"the tables of {self} are of revision {found}, which a newer program made; this one knows {wanted}",
                remedy="use the program that made them",
            )
        raise StaleSchema(f"the tables of {self} are of revision {found}, this program needs {wanted}", remedy=remedy)

    def upgrade(self, revision: str = "head") -> None:
        """Brings the schema to this program's revision, or an earlier one, in one transaction. Safe to run from many
        processes."""
        with self._writer.begin() as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SCHEMA_LOCK})
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@cache
def head() -> str:
    """The revision of the schema that this program needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise StaleSchema("this installation holds no migrations", remedy="install the package again")
    return revision


@cache
def known_revisions() -> frozenset[str]:
    """Every revision that this program can upgrade from."""
    return frozenset(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())
