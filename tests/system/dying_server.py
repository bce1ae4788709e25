"""The real server, which kills itself at every transition of its tables: just before and just after the commit.

Takes the options of `profiler-server` after its own: `dying_server.py MODE DEATHS …`. DEATHS is a file to which each
death is added as a line `before|after TRANSITION` (what the transaction wrote). MODE is `each`, to die at every
transition that has no line there yet, or `NUMBER:before` or `NUMBER:after`, to die at that writing commit.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

from profiler_server.cli import app

WRITES = re.compile(r"\s*(INSERT INTO|UPDATE|DELETE FROM)\s+(\w+)", re.IGNORECASE)


class Executioner:
    """Follows the writing transactions of this process and ends it at the chosen ones."""

    def __init__(self, mode: str, deaths: Path) -> None:
        self._mode = mode
        self._deaths = deaths
        self._done = set(deaths.read_text().splitlines()) if deaths.exists() else set()
        self._lock = threading.Lock()
        self._count = 0
        self._here = threading.local()

    def note(self, connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        if found := WRITES.match(statement):
            connection.info.setdefault("written", set()).add(f"{found[1].split()[0].lower()} {found[2]}")

    def forget(self, connection: Connection) -> None:
        connection.info.pop("written", None)

    def before(self, connection: Connection) -> None:
        written = connection.info.pop("written", None)
        self._here.committed = None
        if written:
            with self._lock:
                self._count += 1
                self._here.committed = (self._count, ", ".join(sorted(written)))
            self._judge("before")

    def after(self, session: Session) -> None:
        if getattr(self._here, "committed", None):
            self._judge("after")

    def _judge(self, when: str) -> None:
        number, transition = self._here.committed
        line = f"{when} {transition}"
        dies = line not in self._done if self._mode == "each" else self._mode == f"{number}:{when}"
        if dies:
            with self._deaths.open("a") as file:
                file.write(line + "\n")
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    mode, deaths, *options = sys.argv[1:]
    executioner = Executioner(mode, Path(deaths))
    event.listen(Engine, "before_cursor_execute", executioner.note)
    event.listen(Engine, "begin", executioner.forget)
    event.listen(Engine, "commit", executioner.before)
    event.listen(Session, "after_commit", executioner.after)
    app(options)
