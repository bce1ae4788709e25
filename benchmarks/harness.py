"""What every benchmark shares: its command line, its table, and the same figures as JSON under stable names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Figures = dict[str, dict[str, float]]
"""Figures by the name of a case, then by the name of a column."""


def arguments(description: str, extra: Sequence[tuple[str, dict]] = ()) -> argparse.Namespace:
    """`--quick` for a run of about a minute, `--json FILE` for the figures, and a benchmark's own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a run of about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    for name, options in extra:
        parser.add_argument(name, **options)
    return parser.parse_args()


def agent(backend: str, cores: str | None) -> list[str]:
    """What a service beside a benchmark measures with, as `device-agent` takes it. Latencies only."""
    return [backend, "--no-energy", *(("--cores", cores) if cores else ())]


def show(title: str, figures: Figures, formats: Mapping[str, str]) -> None:
    """Prints one row for each case; `formats` names the columns and says how to write their values."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for column in formats:
        table.add_column(column, justify="right")
    for case, values in figures.items():
        table.add_row(case, *(form.format(values[c]) if c in values else "-" for c, form in formats.items()))
    Console(width=160).print(table)


def write(path: Path | None, figures: Figures) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
