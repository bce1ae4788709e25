"""The command `search-client`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from lut_db.errors import InvalidInput, LatencyLabError

INTERRUPTED, TERMINATED = 130, 143
FAILED, INVALID = 1, 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Searches networks for real devices: trains a super-network and shrinks it, asking a profiling service "
    "what every candidate costs.",
)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="What to search: a YAML file, see recipes/.")],
    server: Annotated[
        str | None, typer.Option(help="URL of a profiling service. Without it one is started beside the search.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Key of the target, where the service has several.")] = None,
    pin: Annotated[int | None, typer.Option(help="Read the tables as another search did, under its pin.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was interrupted.")] = False,
    out: Annotated[Path, typer.Option(help="Run folders are made in here.")] = Path("runs"),
    database: Annotated[
        str | None, typer.Option(help="File or URL of the tables of the service that is started beside the search.")
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(help="What that service measures with, as device-agent takes it: 'cpu-litert --cores 0-1'."),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without any new measurement after which the search gives up.")
    ] = 900.0,
) -> None:
    """Runs a search and writes its report to a folder named as the recipe."""
    console = Console(highlight=False)
    again = f"search-client run {recipe} --resume" + "".join(
        f" --{name} {shlex.quote(str(value))}"
        for name, value in (
            ("server", server), ("target", target), ("out", out), ("database", database), ("agent", agent)
        )
        if value is not None and value != Path("runs")
    )  # fmt: skip
    with _explained(f"go on with: {again}"):
        for field, own, value in (("database", "tables", database), ("agent", "agents", agent)):
            if server is not None and value is not None:
                raise InvalidInput(
                    f"a service elsewhere has its own {own}", field=field, remedy=f"leave --server or --{field} out"
                )
        words = _words(agent) if agent else None
        with console.status("loading") if console.is_terminal else _nothing():
            # torch takes seconds to import; --help and mistyped options do not wait for it.
            from search_client import recipe as recipes
            from search_client import report
            from search_client.progress import Reporter
            from search_client.run import Options
            from search_client.run import run as run_search

            parsed = recipes.load(recipe)
        options = Options(
            out=out, server=server, target=target, pin=pin, resume=resume, database=database,
            agent=words or Options.agent, patience_s=patience,
        )  # fmt: skip
        result = run_search(parsed, options, Reporter(console))
        console.print()
        console.print(report.summary(result))
        console.print(f"\nreport: {out / parsed.name / 'report.html'}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, or its result.json.")],
) -> None:
    """Writes the report of a finished search again and prints its summary."""
    from search_client import report as reports
    from search_client.run import write_atomically

    with _explained():
        path = folder if folder.is_file() else folder / "result.json"
        try:
            result = json.loads(path.read_text())
        except OSError as error:
            raise InvalidInput(
                f"{path}: {error.strerror}", field="folder", remedy="give the folder of a finished search"
            ) from error
        except ValueError as error:
            raise InvalidInput(f"{path} is no result: {error}", field="folder") from error
        page = path.with_name("report.html")
        write_atomically(page, reports.html(result))
        console = Console(highlight=False)
        console.print(reports.summary(result))
        console.print(f"\nreport: {page}", soft_wrap=True)


@app.command("list")
def list_() -> None:
    """Lists what a recipe may name: networks, data sets and metrics."""
    from search_client import data, metrics, networks

    console = Console(highlight=False)
    for title, names in (("networks", networks.names()), ("data sets", data.names())):
        console.print(f"{title}: {', '.join(names)}")
    for name in metrics.names():
        metric = metrics.load(name)
        console.print(f"metric {name} ({metric.unit}): {metric.description}", markup=False)


def _words(agent: str) -> list[str]:
    try:
        return shlex.split(agent)
    except ValueError as error:
        raise InvalidInput(f"{agent!r}: {error}", field="agent", remedy="close the quotation") from error


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything that was started is ended on the way out.
    raise SystemExit(TERMINATED)


@contextmanager
def _explained(hint: str = "") -> Iterator[None]:
    """Turns errors into a message and an exit status; what to do after an interruption is `hint`."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _say(f"interrupted; {hint}" if hint else "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as ending:
        if ending.code == TERMINATED and hint:
            _say(f"terminated; {hint}")
        raise
    except LatencyLabError as error:
        _say(f"error: {error}")
        raise typer.Exit(INVALID if isinstance(error, InvalidInput) else FAILED) from None
    except BrokenPipeError:
        # Whoever read the output has gone; nothing can be said any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(message: str) -> None:
    print(f"search-client: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
