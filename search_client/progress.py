"""How long steps are shown: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
REFRESH_PER_SECOND = 4
"""Drawing costs time on a machine that may be measured at this moment."""


class Task:
    """One long step. `update` says how far it is; `note` is a word on how it goes."""

    def __init__(self, reporter: Reporter, label: str, total: int | None) -> None:
        self._reporter = reporter
        self._label = label
        self._total = total
        self._done = 0
        self._note = ""
        self._last_line = time.monotonic()
        self._bar = reporter._progress.add_task(label, total=total, note="") if reporter._progress else None

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        self._done, self._total, self._note = done, total if total is not None else self._total, note
        if self._reporter._progress is not None and self._bar is not None:
            self._reporter._progress.update(self._bar, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self.line()

    def line(self) -> None:
        self._last_line = time.monotonic()
        of = f"{self._done}/{self._total}" if self._total else str(self._done)
        self._reporter.say(f"  {self._label}: {of}{'  ' + self._note if self._note else ''}")


class Reporter:
    """Writes to one console. A step's result is always a plain line, so that a log tells what happened."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.quiet = quiet
        self._progress: Progress | None = None
        self._depth = 0

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        """A long step: a bar while it runs where the console is a terminal."""
        if self.quiet or not self.console.is_terminal:
            yield Task(self, label, total)
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
            )
            self._progress.start()
        self._depth += 1
        task = Task(self, label, total)
        try:
            yield task
        finally:
            self._depth -= 1
            if task._bar is not None and self._progress is not None:
                self._progress.remove_task(task._bar)
            if self._depth == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None
