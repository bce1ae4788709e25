"""The command `lut-db`: looks after the database of latency tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from lut_db.errors import LatencyLabError

if TYPE_CHECKING:
    from lut_db.storage import Database

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
snapshots = typer.Typer(no_args_is_help=True, help="Snapshots as files.")
app.add_typer(snapshots, name="snapshot")

DatabaseOption = Annotated[
    str,
    typer.Option(envvar="PROFILER_DATABASE", help="sqlite:///FILE or postgresql://HOST/NAME."),
]
DEFAULT = "sqlite:///latency-lab.sqlite"


@contextmanager
def _opened(address: str, *, checked: bool = True) -> Iterator[Database]:
    """The database, for one command; what goes wrong is told in a line. SQLAlchemy is imported here, not before."""
    from sqlalchemy.exc import SQLAlchemyError

    from lut_db.storage import Database

    try:
        database = Database(address)
        try:
            if checked:
                if database.file is not None and not database.file.exists():
                    _fail(f"there is no file {database.file}; make it with: lut-db upgrade --database {database}")
                database.check()
            yield database
        finally:
            database.close()
    except LatencyLabError as error:
        _fail(str(error))
    except SQLAlchemyError as error:
        _fail(f"the database cannot be used: {type(error).__name__}; check that it runs and that the address is right")


def _fail(message: str) -> NoReturn:
    print(f"lut-db: {message}", file=sys.stderr)
    raise typer.Exit(1)


@app.command()
def upgrade(database: DatabaseOption = DEFAULT) -> None:
    """Makes the tables, or brings them to this program's schema."""
    with _opened(database, checked=False) as opened:
        before = opened.revision()
        opened.upgrade()
        print(f"{opened}: schema {before or 'none'} -> {opened.revision()}")


@app.command()
def check(database: DatabaseOption = DEFAULT) -> None:
    """Says whether the schema is this program's; the exit status is 1 where it is not."""
    with _opened(database) as opened:
        print(f"{opened}: schema {opened.revision()} is right")


@app.command()
def targets(database: DatabaseOption = DEFAULT) -> None:
    """Lists targets with their rows and what waits for them."""
    from lut_db.storage import queries

    with _opened(database) as opened, opened.read() as session:
        _print(
            ["key", "target", "devices", "rows", "pending"],
            [
                [view.key, str(view.target), ", ".join(view.devices), str(view.rows), str(view.pending)]
                for view in queries.read_targets(session)
            ],
        )


@app.command()
def rows(
    target: Annotated[str, typer.Argument(help="Key of a target, as `lut-db targets` lists them.")],
    database: DatabaseOption = DEFAULT,
    plan: Annotated[str | None, typer.Option(help="Only rows of this plan.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this operator kind, or 'network'.")] = None,
    status: Annotated[str | None, typer.Option(help="Only 'measured' or 'failed'.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """Lists the newest rows of a target's tables."""
    from lut_db.storage import queries

    with _opened(database) as opened, opened.read() as session:
        queries.read_target(session, target)
        found = queries.page_of_rows(session, target, plan=plan, kind=kind, status=status, limit=limit)
        _print(
            ["id", "plan", "kind", "key", "rev", "status", "latency_ms", "±", "energy_j", "device", "measured at"],
            [
                [
                    str(row.id), row.plan, of_kind, row.workload, str(row.revision), row.status,
                    "" if row.latency_ms is None else f"{row.latency_ms:.5f}",
                    "" if row.half_width_ms is None else f"{row.half_width_ms:.5f}",
                    "" if row.energy_j is None else f"{row.energy_j:.4g}",
                    row.device, row.measured_at.isoformat(timespec="seconds"),
                ]
                for row, of_kind in found
            ],
        )  # fmt: skip


@app.command()
def remeasure(
    target: Annotated[str, typer.Argument(help="Key of a target.")],
    plan: Annotated[str, typer.Argument(help="Key of a plan, as `lut-db rows` shows it.")],
    database: DatabaseOption = DEFAULT,
    status: Annotated[str, typer.Option(help="Which rows: 'failed' or 'measured'.")] = "failed",
) -> None:
    """Puts rows into the queue again. Their new revisions leave every pin as it is."""
    from lut_db.storage import queries

    with _opened(database) as opened, opened.write() as session:
        queries.read_target(session, target)
        queries.read_plan(session, plan)
        found = queries.page_of_rows(session, target, plan=plan, status=status, limit=1_000_000)
        queries.lock_table(session, target, plan)
        keys = [row.workload for row, _ in found]
        count = queries.enqueue(session, target, plan, keys, queries.clock(session), again=True)
        print(f"{count} measurements enqueued")


@snapshots.command("list")
def list_snapshots(database: DatabaseOption = DEFAULT) -> None:
    """Lists snapshots."""
    from lut_db.storage.snapshots import list_snapshots as found

    with _opened(database) as opened, opened.read() as session:
        _print(
            ["snapshot", "target", "plan", "rows", "corrected"],
            [
                [str(pin.snapshot), pin.target, pin.plan, str(count), "yes" if pin.correction else "no"]
                for pin, count in found(session)
            ],
        )


@snapshots.command("export")
def export_snapshot(
    number: Annotated[int, typer.Argument(min=1, help="Number of the snapshot.")],
    file: Annotated[Path, typer.Argument(help="JSON file to write.")],
    database: DatabaseOption = DEFAULT,
) -> None:
    """Writes a snapshot to a file, complete in itself."""
    from lut_db.storage.snapshots import export_snapshot as export

    with _opened(database) as opened, opened.read() as session:
        snapshot = export(session, number)
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(snapshot.model_dump_json(indent=1) + "\n")
        os.replace(partial, file)
    except OSError as error:
        _fail(f"{file} cannot be written: {error.strerror}")
    print(f"snapshot {number}: {len(snapshot.rows)} rows in {file}")


@snapshots.command("import")
def import_snapshot(
    file: Annotated[Path, typer.Argument(help="JSON file that `lut-db snapshot export` wrote.")],
    database: DatabaseOption = DEFAULT,
) -> None:
    """Stores a snapshot from a file, under a number of its own."""
    from lut_db.storage.snapshots import import_snapshot as store
    from lut_db.storage.snapshots import parse_snapshot

    try:
        text = file.read_bytes()
    except OSError as error:
        _fail(f"{file} cannot be read: {error.strerror}")
    with _opened(database) as opened:
        snapshot = parse_snapshot(text)
        with opened.write() as session:
            number = store(session, snapshot)
        print(f"snapshot {number}: {len(snapshot.rows)} rows from {file}")


def _print(columns: list[str], lines: list[list[str]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        for line in [columns, *lines]:
            print("\t".join(line))
        return
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    app()
